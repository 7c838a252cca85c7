"""The tokens of a text and their offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The tokens of one text, and where each of them is in it."""

    ids: npt.NDArray[np.int32]
    """[T]"""
    starts: npt.NDArray[np.int32]
    """[T] The first character of token t."""
    ends: npt.NDArray[np.int32]
    """[T] The character after the last of token t; never decreases."""
    decoded: str | None
    """The tokens as text again; None if that is known to be the text."""

    @classmethod
    def of(cls, ids: Sequence[int], offsets: Sequence[tuple[int, int]], decoded: str) -> Self:
        """Return tokens from the lists of the tokenizers library."""
        places = np.array(offsets, dtype=np.int32).reshape(-1, 2)
        return cls(ids=np.array(ids, dtype=np.int32), starts=places[:, 0], ends=places[:, 1], decoded=decoded)
