"""How many of something, in words."""

from __future__ import annotations


def as_count(number: int, one: str, many: str = "") -> str:
    """1 → 1 step; 2000 → 2,000 steps. Words that change with the number go along: `one` "row was left out", `many` "rows were left
    out"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
