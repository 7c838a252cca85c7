"""The errors that loratune raises on purpose, and the secrets that none of them may show.

    LoratuneError                 exit code
    ├── RecipeError                   2      a setting is unknown, of the wrong type, or contradicts another
    ├── DataError                     3      a row, a file or a template cannot be trained on
    ├── MachineError                  4      the machine lacks memory, disk, device or network
    │   └── OutOfMemory               4      memory ran out while running, where nothing can be made smaller
    ├── RunError                      1      failed while running
    └── Interrupted                 130      stopped by the user (Ctrl-C); the run can be resumed
        └── Terminated              143      stopped by SIGTERM, as schedulers do; 128 + 15, as shells report it

Each says where (file and line), what (the value) and what to do about it (the fix). Any other exception that reaches a
user is a bug in loratune.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@]+(?=@)")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|ACCESS_KEY)(_|$)")
_SHORTEST = 8
"""Minimum characters of a secret value; a shorter one may be any word."""
HIDDEN = "•••"
MAX_TEXT_LENGTH = 2000
"""Maximum characters of an error text, which may quote a row of many megabytes."""


def printable(text: str) -> str:
    """Return a text fit to be shown: of limited length, without secrets and without half surrogate pairs."""
    text = without_secrets(text)
    if len(text) > MAX_TEXT_LENGTH:
        text = f"{text[:MAX_TEXT_LENGTH]}… ({len(text) - MAX_TEXT_LENGTH:,} more characters)"
    return text.encode("utf-8", "backslashreplace").decode()


class LoratuneError(Exception):
    """Base of all errors that are meant for the user.

    Args:
        problem: What is wrong, with the offending value.
        fix: What the user can do about it.
        file: The file in which it was found.
        line: The line in that file, from 1.
    """

    exit_code = 1

    def __init__(self, problem: str, *, fix: str = "", file: str | Path | None = None, line: int | None = None) -> None:
        self.problem = printable(problem)
        self.fix = printable(fix)
        self.file = printable(str(file)) if file is not None else None
        self.line = line
        super().__init__(str(self))

    @property
    def place(self) -> str:
        """`file:line`, `file`, or an empty text."""
        if self.file is None:
            return ""
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        fix = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{where}{self.problem}{fix}"

    def as_dict(self) -> dict[str, object]:
        """Return the error as `--json` prints it."""
        return {
            "error": type(self).__name__,
            "problem": self.problem,
            "fix": self.fix,
            "file": self.file,
            "line": self.line,
            "exit_code": self.exit_code,
        }


class RunError(LoratuneError):
    """Something failed while running."""

    exit_code = 1


class RecipeError(LoratuneError):
    """A recipe or an argument is wrong."""

    exit_code = 2


class DataError(LoratuneError):
    """A data file, a row, or the chat template that renders it is wrong."""

    exit_code = 3


class MachineError(LoratuneError):
    """This machine lacks memory, disk, device or network."""

    exit_code = 4


class OutOfMemory(MachineError):
    """Memory ran out while running, where nothing can be made smaller."""


class Interrupted(LoratuneError):
    """The user stopped the run."""

    exit_code = 130


class Terminated(Interrupted):
    """SIGTERM stopped the run."""

    exit_code = 143


class BadRow(Exception):
    """A row cannot be trained on, for the reason given; whoever reads the rows leaves it out or raises `DataError`."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def plural(number: float, one: str, many: str = "") -> str:
    """Return a number with its noun: 1 step; 2,000 steps; 1.5 epochs.

    Args:
        number: The number.
        one: The singular, with any words that change along: "row was left out".
        many: The plural, "rows were left out"; default: the singular with an s.
    """
    shown = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{shown} {one if number == 1 else many or one + 's'}"


# ---- secrets: passwords in URLs, Hub tokens by their form, and the values of environment variables whose names say so


def find_secret(text: str) -> tuple[int, str] | None:
    """Return the position of the first secret in a text and what it is, without the secret itself."""
    for pattern, what in ((_IN_ADDRESS, "a password or token in a URL"), (_HUB_TOKEN, "a Hub token")):
        match = pattern.search(text)
        if match:
            return match.start(), what
    for name, value in _in_environment():
        place = text.find(value)
        if place >= 0:
            return place, f"the value of {name}"
    return None


def without_secrets(text: str) -> str:
    """Return a text with every known secret hidden."""
    text = _HUB_TOKEN.sub(HIDDEN, _IN_ADDRESS.sub(HIDDEN, text))
    for _, value in _in_environment():
        text = text.replace(value, HIDDEN)
    return text


def _in_environment() -> list[tuple[str, str]]:
    """Return name and value of each environment variable that is a secret, the longest value first."""
    found = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name.upper())
    ]
    return sorted(found, key=lambda pair: -len(pair[1]))
