"""The words in which an answer differs from its reference."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import NamedTuple

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MIN_COMMON_FRACTION = 0.3
"""Below this fraction of common words, marks would cover nearly everything."""


class DiffPiece(NamedTuple):
    """Neighboring words: `plain`, `extra` only in the answer, `missing` only in the reference."""

    text: str
    kind: str


def _count(words: list[str]) -> int:
    """Return the number of words without the spaces, which all texts have in common."""
    return sum(not word.isspace() for word in words)


def unmarked(text: str) -> tuple[DiffPiece, ...]:
    """Return a text as one piece without marks."""
    return (DiffPiece(text, "plain"),) if text else ()


def mark_differences(answer: str, reference: str) -> tuple[DiffPiece, ...]:
    """Return the answer in pieces, with the reference's words that it lacks in their places.

    Joined without the missing pieces it is the answer. An answer that has little in common with the reference is left
    unmarked.
    """
    said, wanted = _WORDS.findall(answer), _WORDS.findall(reference)
    matcher = SequenceMatcher(None, wanted, said, autojunk=False)
    same = [word for block in matcher.get_matching_blocks() for word in wanted[block.a : block.a + block.size]]
    if 2 * _count(same) < _MIN_COMMON_FRACTION * (_count(wanted) + _count(said)):
        return unmarked(answer)
    pieces = []
    for operation, first, last, start, stop in matcher.get_opcodes():
        if operation == "equal":
            pieces.append(DiffPiece("".join(said[start:stop]), "plain"))
            continue
        pieces += [DiffPiece("".join(wanted[first:last]), "missing")] if last > first else []
        pieces += [DiffPiece("".join(said[start:stop]), "extra")] if stop > start else []
    return tuple(pieces)
