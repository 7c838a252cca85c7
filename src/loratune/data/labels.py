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
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from loratune.data.conversation import BadRow, Origin, Rejected
from loratune.data.spans import Span
from loratune.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["error", "truncate", "drop"]
Encoded: TypeAlias = "list[tuple[Text, Encoding, str]]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One tokenised conversation."""

    input_ids: npt.NDArray[np.int32]
    """[T]"""
    supervised: npt.NDArray[np.bool_]
    """[T] Whether token t carries loss; it is predicted from the tokens before it, so position 0 never does."""
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A rendered conversation, before tokenising."""

    text: str
    spans: list[Span] | None
    """None: every token is trained."""
    check: list[Span] | None
    """The spans as found the second way, where they differ by character."""
    plain: bool
    origin: Origin


def encode(backend: Tokenizer, texts: Sequence[Text]) -> Encoded:
    """Each text with its tokens, and with what these are as text again."""
    encodings = backend.encode_batch([text.text for text in texts], add_special_tokens=False)
    decoded = backend.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
    return list(zip(texts, encodings, decoded, strict=True))


@dataclass(slots=True, kw_only=True)
class _Long:
    """Examples over the limit, under `on_long: error`."""

    count: int = 0
    first: Origin | None = None
    longest: int = 0


class Labels:
    """Tokenises texts and labels their tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        on_long: OnLong,
        counts: Counter[str],
        rejected: list[Rejected],
    ) -> None:
        self._backend = backend_of(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._specials = {i for i, token in added.items() if token.special}
        self._stops = {*added, tokenizer.eos_token_id}  # what may be a stop token: one token, whatever is before it
        self._max_length = max_length
        self._on_long = on_long
        self._counts = counts
        self._rejected = rejected
        self._long = _Long()
        self._frame = _text_frame(tokenizer)

    def __call__(self, encoded: Encoded) -> list[Example]:
        examples: list[Example] = []
        for text, encoding, decoded in encoded:
            try:
                self._check_round_trip(text.text, decoded, encoding)
                example = self._fit(self._label(text, encoding))
            except BadRow as bad:
                self._rejected.append(Rejected(origin=text.origin, reason=str(bad)))
                continue
            if example is not None:
                examples.append(example)
        return examples

    def finish(self) -> None:
        """Complain about long examples, once all are known."""
        if self._long.first is not None:
            raise DataError(
                f"{self._long.count} examples are longer than max_length {self._max_length}; the longest has "
                f"{self._long.longest} tokens",
                file=self._long.first.file,
                line=self._long.first.line,
                fix="raise data.max_length, or set data.on_long to truncate or drop",
            )

    def _label(self, text: Text, encoding: Encoding) -> Example:
        ids = np.array(encoding.ids, dtype=np.int32)
        if text.plain:
            ids = self._frame.around(ids)
        if text.spans is None:
            supervised = np.ones(len(ids), dtype=np.bool_)
        else:
            supervised = self._mask(text, text.spans, encoding, ids)
            if text.check is not None and not np.array_equal(supervised, self._mask(text, text.check, encoding, ids)):
                raise _disagreement(text)
            self._counts["verified"] += 1
        supervised[:1] = False
        if not supervised.any():
            raise BadRow("nothing to train")
        return Example(input_ids=ids, supervised=supervised, origin=text.origin)

    def _mask(
        self, text: Text, spans: Sequence[Span], encoding: Encoding, ids: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.bool_]:
        mask = np.zeros(len(encoding), dtype=np.bool_)
        for start, end in spans:
            first, last, straddles = _tokens_of(encoding, text.text, start, end)
            self._counts["straddling"] += straddles
            if spans is text.spans and int(ids[last]) not in self._stops:
                raise BadRow("the tokenizer does not write the stop token of an answer as one token")
            mask[first : last + 1] = True
        return mask

    def _check_round_trip(self, text: str, decoded: str, encoding: Encoding) -> None:
        """What is trained must be what is in the data: no unknown characters, no lost ones."""
        if decoded == text or _nfc(decoded) == _nfc(text):
            return
        # Special tokens may swallow the blanks beside them (Phi-3); the text between two of them must still be the same.
        ids, offsets = encoding.ids, encoding.offsets
        start = 0
        for stop in [*(n for n, token in enumerate(ids) if token in self._specials), len(ids)]:
            if stop > start:
                original = text[offsets[start][0] : offsets[stop - 1][1]]
                back = self._backend.decode(ids[start:stop], skip_special_tokens=False)
                if _nfc(original).strip() != _nfc(back).strip():
                    raise BadRow(f"the tokenizer cannot write it: {_difference(original, back)}")
            start = stop + 1

    def _fit(self, example: Example) -> Example | None:
        """The example within `max_length`, or None where it is dropped."""
        length = len(example.input_ids)
        if length <= self._max_length:
            return example
        if self._on_long == "error":
            self._long.count += 1
            self._long.longest = max(self._long.longest, length)
            self._long.first = self._long.first or example.origin
            return None
        if self._on_long == "drop":
            self._counts["dropped_long"] += 1
            return None
        supervised = example.supervised[: self._max_length]
        if not supervised.any():
            self._counts["dropped_empty"] += 1
            return None
        self._counts["truncated"] += 1
        return Example(input_ids=example.input_ids[: self._max_length], supervised=supervised, origin=example.origin)


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


def _tokens_of(encoding: Encoding, text: str, start: int, end: int) -> tuple[int, int, bool]:
    """The tokens of a span: first, last, and whether one reaches into it from before (that one is left out)."""
    first = last = None
    for position in range(start, end):  # a tokenizer may give no token to a blank, so ask on
        first = encoding.char_to_token(position)
        if first is not None:
            break
    for position in range(end - 1, start - 1, -1):
        last = encoding.char_to_token(position)
        if last is not None:
            break
    if first is None or last is None:
        raise BadRow("an answer has no tokens")
    extent, last_extent = encoding.token_to_chars(first), encoding.token_to_chars(last)
    assert extent is not None
    assert last_extent is not None
    straddles = extent[0] < start
    beyond = text[end : last_extent[1]]
    if beyond.strip():
        raise BadRow(f"the last token of an answer holds text after it: {beyond!r}")
    return first + straddles, last, straddles


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _difference(original: str, decoded: str) -> str:
    at = len(os.path.commonprefix([original, decoded]))  # noqa: RUF071 - of characters
    return f"{original[max(0, at - 10) : at + 20]!r} becomes {decoded[max(0, at - 10) : at + 20]!r}"


def _disagreement(text: Text) -> DataError:
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
