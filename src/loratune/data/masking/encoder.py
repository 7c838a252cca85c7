"""Texts → tokens: word by word with a cache if the tokenizer allows it, otherwise as a batch of full texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.data.masking.tokenizer import exact_offsets
from loratune.data.masking.tokens import Tokens
from loratune.data.masking.word_cache import WordCachingEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer


class Encoder:
    """Tokenizes texts.

    Args:
        backend: The Rust core of a fast tokenizer.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        with exact_offsets(backend):
            self._by_words = WordCachingEncoder.of(backend)

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each text."""
        with exact_offsets(self._backend):
            found = self._by_words(texts) if self._by_words is not None else [None] * len(texts)
            rest = iter(self._batch([text for text, tokens in zip(texts, found, strict=True) if tokens is None]))
            return [tokens if tokens is not None else next(rest) for tokens in found]

    def _batch(self, texts: Sequence[str]) -> list[Tokens]:
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        decoded = self._backend.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
        return [
            Tokens.of(encoding.ids, encoding.offsets, text) for encoding, text in zip(encodings, decoded, strict=True)
        ]
