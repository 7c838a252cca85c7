"""Statistics of a side of the data: histogram of lengths, scripts of letters."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def histogram(lengths: Sequence[int], *, max_bins: int = 12) -> dict[str, list[int]]:
    """Count the lengths from each edge up to, but not including, the next.

    All bins have the same width: 1, 2 or 5 times a power of ten.

    Args:
        lengths: Tokens of each example.
        max_bins: The maximum number of bins.
    """
    shortest, longest = min(lengths), max(lengths)
    widths = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    width = next(width for width in widths if longest // width - shortest // width < max_bins)
    first = shortest // width
    counts = np.bincount(np.asarray(lengths) // width - first)
    return {"edges": [(first + n) * width for n in range(len(counts) + 1)], "counts": counts.tolist()}


def scripts(texts: Sequence[str]) -> dict[str, float]:
    """Return the share of each script among the letters of all texts, the largest first, without those under 0.1 %.

    A script is the first word of a letter's Unicode name: `LATIN`, `CYRILLIC`, `CJK`, `HIRAGANA`, `ARABIC`, …
    """
    counts = np.zeros(0x110000, np.int64)
    for start in range(0, len(texts), 1024):
        text = "".join(texts[start : start + 1024])
        codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
        chunk = np.bincount(codes)
        counts[: len(chunk)] += chunk
    letters: Counter[str] = Counter()
    for code in np.flatnonzero(counts):
        character = chr(code)
        if character.isalpha():
            letters[unicodedata.name(character, "UNNAMED").partition(" ")[0]] += int(counts[code])
    total = letters.total()
    return {name: round(n / total, 4) for name, n in letters.most_common() if n >= total / 1000}
