"""The tokens of a text and their offsets, and a tokenizer set up to report exact ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from loratune.run.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


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


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the tokenizer's Rust core.

    Raises:
        DataError: The tokenizer is not a fast one, so it has no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not report where in the text its tokens are",
            fix="use a model with a fast tokenizer (tokenizer.json)",
        )
    return tokenizer.backend_tokenizer


@contextmanager
def exact_offsets(backend: Tokenizer) -> Iterator[None]:
    """Make the tokenizer report the true extent of each token, and of the full text.

    The settings are restored afterwards: the tokenizer is saved with the run.
    """
    post_processor, truncation, padding = backend.post_processor, backend.truncation, backend.padding
    # It adds special tokens and, in byte-level tokenizers, trims blanks off the offsets (`trim_offsets`), which would
    # hide a token that reaches into a header.
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        backend.post_processor = post_processor
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
