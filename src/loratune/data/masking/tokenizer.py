"""A tokenizer's Rust core, set up to report exact offsets."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from loratune.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


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
