"""Texts and character spans → token ids and labels, with the tokenizer's own offsets.

Texts are tokenised in batches. A token is trained if the whole of it belongs to a trained span. What a tokenizer cannot
give back as it was (unknown characters, lost blanks) is not trained on.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from loratune.data.masking.spans_by_substitution import Span
from loratune.data.masking.word_cache import Tokens, WordCachingEncoder
from loratune.data.rows.conversation import BadRow, Origin
from loratune.run.errors import DataError, plural

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


OnLong = Literal["error", "truncate", "drop"]


TokenMask = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Token ids [T], and which of them carry loss [T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """A rendered conversation, before tokenising."""

    text: str
    spans: list[Span] | None
    """None: every token is trained."""
    check: list[Span] | None
    """The spans as found the second way, where they differ by character."""
    names: tuple[str, ...]
    """Of the messages of the spans, for people."""
    without_stop_token: frozenset[int]
    """The numbers of the spans that end without a stop token."""
    is_plain_text: bool
    origin: Origin
    num_controls: int | None
    """Special tokens that the template writes; None: they are not counted."""
    hidden: str | None
    """The text with stand-ins for special tokens' names that are text; None where there are none. See `specials`."""


class Encoder:
    """Tokenises texts: word by word where the tokenizer allows it, else whole."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        with exact_offsets(backend):
            self._words = WordCachingEncoder.of(backend)

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text."""
        with exact_offsets(self._backend):
            found = self._words(texts) if self._words is not None else [None] * len(texts)
            rest = iter(self._whole([text for text, tokens in zip(texts, found, strict=True) if tokens is None]))
            return [tokens if tokens is not None else next(rest) for tokens in found]

    def _whole(self, texts: Sequence[str]) -> list[Tokens]:
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        decoded = self._backend.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
        return [
            _with_offsets(encoding.ids, encoding.offsets, back)
            for encoding, back in zip(encodings, decoded, strict=True)
        ]


def _with_offsets(ids: Sequence[int], offsets: Sequence[tuple[int, int]], decoded: str) -> Tokens:
    places = np.array(offsets, dtype=np.int32).reshape(-1, 2)
    return Tokens(ids=np.array(ids, dtype=np.int32), starts=places[:, 0], ends=places[:, 1], decoded=decoded)


@dataclass(slots=True, kw_only=True)
class LengthViolations:
    """Examples over the limit, under `on_long: error`."""

    count: int = 0
    first: Origin | None = None
    longest: int = 0

    def add(self, other: LengthViolations) -> None:
        """Count in what comes after."""
        self.count += other.count
        self.longest = max(self.longest, other.longest)
        self.first = self.first or other.first

    def complain(self, max_length: int) -> None:
        """Raise `DataError` if there were any."""
        if self.first is not None:
            raise DataError(
                f"{plural(self.count, 'example is', 'examples are')} longer than max_length {max_length}; the longest has {self.longest} tokens",
                file=self.first.file,
                line=self.first.line,
                fix="raise data.max_length, or set data.on_long to truncate or drop",
            )


class TokenMasker:
    """Labels the tokens of texts.

    Args:
        tokenizer: A fast one.
        max_length: The longest example, in tokens.
        on_long: What happens to a longer one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, on_long: OnLong) -> None:
        self._backend = backend_of(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._specials = {i for i, token in added.items() if token.special}
        self._stops = {*added, tokenizer.eos_token_id}  # what may be a stop token: one token, whatever is before it
        self._max_length = max_length
        self._on_long = on_long
        self._frame = _text_frame(tokenizer)
        self.counts: Counter[str] = Counter()
        self.too_long = LengthViolations()

    def __call__(self, text: RenderedText, tokens: Tokens) -> TokenMask | None:
        """The example; None where it is left out for its length.

        Raises:
            BadRow: It cannot be trained on.
            DataError: The two ways of finding the trained tokens disagree.
        """
        self._check_round_trip(text.text, tokens)
        return self._fit(*self._label(text, tokens), text.origin)

    def _label(self, text: RenderedText, tokens: Tokens) -> TokenMask:
        ids = tokens.ids
        if text.is_plain_text:
            ids = self._frame.around(ids)
        if text.spans is None:
            supervised = np.ones(len(ids), dtype=np.bool_)
        else:
            supervised = self._mask(text, text.spans, tokens)
            if text.check is not None and not np.array_equal(supervised, self._mask(text, text.check, tokens)):
                raise _disagreement(text)
            self.counts["verified"] += 1
        supervised[:1] = False
        if not supervised.any():
            raise BadRow("nothing to train")
        return ids, supervised

    def _mask(self, text: RenderedText, spans: Sequence[Span], tokens: Tokens) -> npt.NDArray[np.bool_]:
        mask = np.zeros(len(tokens.ids), dtype=np.bool_)
        for number, (start, end) in enumerate(spans):
            name = text.names[number] if spans is text.spans else "a trained message"
            first, last, straddles = _tokens_of(tokens, text.text, start, end, name)
            self.counts["straddling"] += straddles
            ended = spans is text.spans and number not in text.without_stop_token
            if ended and int(tokens.ids[last]) not in self._stops:
                raise BadRow(f"the tokenizer does not write the stop token of {name} as one token")
            mask[first : last + 1] = True
        return mask

    def _check_round_trip(self, text: str, tokens: Tokens) -> None:
        """What is trained must be what is in the data: no unknown characters, no lost ones."""
        decoded = tokens.decoded
        if decoded is None or decoded == text or _nfc(decoded) == _nfc(text):
            return
        # Special tokens may swallow the blanks beside them (Phi-3); the text between two of them must still be the same.
        ids = tokens.ids.tolist()
        start = 0
        for stop in [*(n for n, token in enumerate(ids) if token in self._specials), len(ids)]:
            if stop > start:
                original = text[tokens.starts[start] : tokens.ends[stop - 1]]
                back = self._backend.decode(ids[start:stop], skip_special_tokens=False)
                if _nfc(original).strip() != _nfc(back).strip():
                    raise BadRow(f"the tokenizer cannot write it: {_difference(original, back)}")
            start = stop + 1

    def _fit(self, ids: npt.NDArray[np.int32], supervised: npt.NDArray[np.bool_], origin: Origin) -> TokenMask | None:
        """The example within `max_length`, or None where it is left out."""
        length = len(ids)
        if length <= self._max_length:
            return ids, supervised
        if self._on_long == "error":
            self.too_long.add(LengthViolations(count=1, first=origin, longest=length))
            return None
        if self._on_long == "drop":
            self.counts["dropped_long"] += 1
            return None
        supervised = supervised[: self._max_length]
        if not supervised.any():
            self.counts["dropped_empty"] += 1
            return None
        self.counts["truncated"] += 1
        return ids[: self._max_length], supervised


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What goes around plain text: the tokenizer's own start, and the end-of-sequence token, so that it learns to stop."""

    start: tuple[int, ...]
    end: tuple[int, ...]

    def around(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        start = () if tuple(ids[: len(self.start)]) == self.start else self.start
        end = () if tuple(ids[len(ids) - len(self.end) :]) == self.end else self.end
        return np.concatenate([np.array(start, np.int32), ids, np.array(end, np.int32)])


def _text_frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((tuple(full[:n]) for n in range(len(full)) if full[n : n + len(plain)] == plain), ())
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return _Frame(start=start, end=end)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's Rust core."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not say where in the text its tokens are",
            fix="take a model with a fast tokenizer (tokenizer.json)",
        )
    return tokenizer.backend_tokenizer


@contextmanager
def exact_offsets(backend: Tokenizer) -> Iterator[None]:
    """Let the tokenizer give the true extent of each token, of the whole text.

    Its post-processor adds special tokens and, in byte-level tokenizers, cuts blanks off the extents, which would hide
    a token that reaches into a header. Put back afterwards: the tokenizer is saved with the run.
    """
    post_processor, truncation, padding = backend.post_processor, backend.truncation, backend.padding
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


def _tokens_of(tokens: Tokens, text: str, start: int, end: int, name: str) -> tuple[int, int, bool]:
    """The tokens of a span: first, last, and whether one reaches into it from before (that one is left out)."""
    starts, ends = tokens.starts, tokens.ends
    first = int(ends.searchsorted(start, side="right"))
    if first == len(ends) or starts[first] >= end:
        raise BadRow(f"{name} has no tokens")
    last = int(ends.searchsorted(end - 1, side="right"))
    if last == len(ends) or starts[last] >= end:  # a tokenizer may give no token to a blank: the one before it
        last = int(ends.searchsorted(ends[last - 1] - 1, side="right"))
    straddles = bool(starts[first] < start)
    beyond = text[end : ends[last]]
    if beyond.strip():
        raise BadRow(f"the tokenizer's last token of {name} holds text of the chat template after it: {beyond!r}")
    return first + straddles, last, straddles


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _difference(original: str, decoded: str) -> str:
    at = len(os.path.commonprefix([original, decoded]))  # noqa: RUF071 - of characters
    return f"{original[max(0, at - 10) : at + 20]!r} becomes {decoded[max(0, at - 10) : at + 20]!r}"


def _disagreement(text: RenderedText) -> DataError:
    assert text.spans is not None
    assert text.check is not None
    first = [text.text[start:end] for start, end in text.spans]
    second = [text.text[start:end] for start, end in text.check]
    return DataError(
        "two ways of finding the trained tokens disagree about this conversation, so it cannot be trained:\n"
        f"  by substitution: {first}\n  by its own marks or prompts: {second}",
        file=text.origin.file,
        line=text.origin.line,
        fix="the chat template is at fault, or this conversation is one it was not written for; another model's "
        "tokenizer, or data.train_on=all",
    )
