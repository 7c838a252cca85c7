"""JSON text → values, with an error where an object has a key twice: Python's own reader keeps the last, silently."""

from __future__ import annotations

import json
from typing import Any


class RepeatedKey(ValueError):
    """An object of a JSON text has a key twice."""


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKey(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_as_object)
"""Raises `RepeatedKey`, besides what `json` raises."""


def parse_json(text: str) -> Any:
    """Parse one JSON text.

    Raises:
        RepeatedKey: An object has a key twice, of which one value would be lost.
        ValueError, RecursionError: As `json.loads`.
    """
    return DECODER.decode(text)
