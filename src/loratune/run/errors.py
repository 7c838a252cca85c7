"""The errors that loratune raises on purpose.

    LoratuneError                 exit code
    ├── RecipeError                   2      a setting is unknown, of the wrong type, or contradicts another
    ├── DataError                     3      a row, a file or a template cannot be trained on
    ├── MachineError                  4      memory, disk, device or network cannot do it
    ├── RunError                      1      failed while running
    └── Interrupted                 130      stopped by the user (Ctrl-C); the run can be resumed
        └── Terminated              143      stopped by SIGTERM, as schedulers do; 128 + 15, what shells report for it

Each says where (file and line), what (the value) and what to do about it (the fix). Everything else that reaches a
user is a bug of loratune.
"""

from __future__ import annotations

from pathlib import Path

from loratune.run.secrets import without_secrets

LONGEST_TEXT = 2000
"""Characters of a text of an error; it may quote a row of many megabytes."""


def printable(text: str) -> str:
    """The text as it can be shown: not endless, without secrets, and without half surrogate pairs."""
    text = without_secrets(text)
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}… ({len(text) - LONGEST_TEXT:,} more characters)"
    return text.encode("utf-8", "backslashreplace").decode()


class LoratuneError(Exception):
    """Base of every error that is meant for the user.

    Args:
        problem: What is wrong, with the value that is wrong.
        fix: What the user can do about it.
        file: The file it was found in.
        line: The line in that file, counted from 1.
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
        """`file:line`, `file`, or nothing."""
        if self.file is None:
            return ""
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        fix = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{where}{self.problem}{fix}"

    def as_dict(self) -> dict[str, object]:
        """The error for `--json` output."""
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
    """This machine cannot do it: memory, disk, device, network."""

    exit_code = 4


class Interrupted(LoratuneError):
    """The user stopped the run."""

    exit_code = 130


class Terminated(Interrupted):
    """SIGTERM stopped the run."""

    exit_code = 143


def plural(number: int, one: str, many: str = "") -> str:
    """1 → 1 step; 2000 → 2,000 steps. Words that change with the number go along: `one` "row was left out", `many` "rows were left
    out"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
