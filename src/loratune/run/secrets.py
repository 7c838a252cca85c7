"""Secrets: found in what a user wrote, and kept out of what is shown.

Recognized are passwords in URLs, tokens of the Hugging Face Hub by their form, and the values of environment variables
whose names mark them as secret. Imports nothing of loratune, since errors are built on it.
"""

from __future__ import annotations

import os
import re

_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@]+(?=@)")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|ACCESS_KEY)(_|$)")
_SHORTEST = 8
"""Minimum characters of a secret value; a shorter one may be any word."""
HIDDEN = "•••"


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
