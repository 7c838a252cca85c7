"""Tokens and character spans → token masks.

A token is trained if all of its characters belong to a trained span. A text that the tokenizer cannot reproduce
(unknown characters, lost blanks) is not trained on.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from loratune.data.masking.tokenizer import backend_of
from loratune.run.errors import BadRow, DataError, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.masking.spans import Span
    from loratune.data.masking.tokens import Tokens
    from loratune.data.rows.row import Origin

OnLong = Literal["error", "truncate", "drop", "split"]

TokenMask = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Token ids [T], and whether each carries loss [T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """A rendered conversation, before tokenization."""

    text: str
    spans: list[Span] | None
    """None: every token is trained."""
    check: list[Span] | None
    """The spans found the second way, if any character differs."""
    names: tuple[str, ...]
    """A name for the message of each span, for error messages."""
    without_stop_token: frozenset[int]
    """Indices of the spans that end without a stop token."""
    is_plain_text: bool
    origin: Origin
    num_controls: int | None
    """Special tokens that the template writes; None if they are not counted."""
    hidden: str | None
    """The text with stand-ins for the names of special tokens in it; None if there are none. See `special_tokens`."""


@dataclass(slots=True, kw_only=True)
class LengthViolations:
    """Examples over the length limit, under `on_long: error`."""

    count: int = 0
    first: Origin | None = None
    longest: int = 0

    def add(self, other: LengthViolations) -> None:
        """Add the violations of later examples."""
        self.count += other.count
        self.longest = max(self.longest, other.longest)
        self.first = self.first or other.first

    def raise_if_any(self, max_length: int) -> None:
        """Raise `DataError` if there are any."""
        if self.first is not None:
            raise DataError(
                f"{plural(self.count, 'example is', 'examples are')} longer than max_length {max_length}; the "
                "longest has "
                f"{self.longest} tokens",
                file=self.first.file,
                line=self.first.line,
                fix="raise data.max_length, or set data.on_long to truncate or drop",
            )


class TokenMasker:
    """Masks the tokens of texts and verifies the masks.

    Args:
        tokenizer: A fast tokenizer.
        max_length: The maximum length of an example, in tokens.
        on_long: What happens to longer examples.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, on_long: OnLong) -> None:
        self._backend = backend_of(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._specials = {i for i, token in added.items() if token.special}
        self._stops = {*added, tokenizer.eos_token_id}  # added tokens are one token whatever precedes them
        self._max_length = max_length
        self._on_long = on_long
        self._frame = _text_frame(tokenizer)
        self.counts: Counter[str] = Counter()
        self.too_long = LengthViolations()

    def __call__(self, text: RenderedText, tokens: Tokens) -> list[TokenMask]:
        """Return token ids and mask of one example, or of the parts of a document; none if it is left out.

        Raises:
            BadRow: The text cannot be trained on.
            DataError: The two ways of finding the trained tokens disagree.
        """
        self._check_round_trip(text.text, tokens)
        ids, supervised = self._label(text, tokens)
        if self._on_long == "split" and text.is_plain_text:
            return self._parts(ids, supervised)
        return self._fit(ids, supervised, text.origin)

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
        """Check that the tokens reproduce the text: no unknown and no lost characters."""
        decoded = tokens.decoded
        if decoded is None or decoded == text or _nfc(decoded) == _nfc(text):
            return
        # Special tokens may swallow adjacent blanks (Phi-3); the text between two of them must still be the same.
        ids = tokens.ids.tolist()
        start = 0
        for stop in [*(n for n, token in enumerate(ids) if token in self._specials), len(ids)]:
            if stop > start:
                original = text[tokens.starts[start] : tokens.ends[stop - 1]]
                back = self._backend.decode(ids[start:stop], skip_special_tokens=False)
                if _nfc(original).strip() != _nfc(back).strip():
                    raise BadRow(f"the tokenizer cannot write it: {_difference(original, back)}")
            start = stop + 1

    def _parts(self, ids: npt.NDArray[np.int32], supervised: npt.NDArray[np.bool_]) -> list[TokenMask]:
        """Cut a document into examples. Each starts with the last token of the one before, which predicts its first."""
        size = self._max_length
        starts = range(0, max(1, len(ids) - 1), max(1, size - 1))
        self.counts["split"] += len(ids) > size
        parts = [(ids[start : start + size], supervised[start : start + size].copy()) for start in starts]
        for _, mask in parts:
            mask[:1] = False
        return parts

    def _fit(self, ids: npt.NDArray[np.int32], supervised: npt.NDArray[np.bool_], origin: Origin) -> list[TokenMask]:
        """Apply `on_long`."""
        length = len(ids)
        if length <= self._max_length:
            return [(ids, supervised)]
        if self._on_long in ("error", "split"):  # an answer has no second half
            self.too_long.add(LengthViolations(count=1, first=origin, longest=length))
            return []
        if self._on_long == "drop":
            self.counts["dropped_long"] += 1
            return []
        supervised = supervised[: self._max_length]
        if not supervised.any():
            self.counts["dropped_empty"] += 1
            return []
        self.counts["truncated"] += 1
        return [(ids[: self._max_length], supervised)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """The tokens around plain text: the tokenizer's own start, and the end-of-sequence token, to learn to stop."""

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


def _tokens_of(tokens: Tokens, text: str, start: int, end: int, name: str) -> tuple[int, int, bool]:
    """Return the first and the last token of a span, and whether a token straddles its start (that one is left out)."""
    starts, ends = tokens.starts, tokens.ends
    first = int(ends.searchsorted(start, side="right"))
    if first == len(ends) or starts[first] >= end:
        raise BadRow(f"{name} has no tokens")
    last = int(ends.searchsorted(end - 1, side="right"))
    if last == len(ends) or starts[last] >= end:  # a tokenizer may give a blank no token: take the one before it
        last = int(ends.searchsorted(ends[last - 1] - 1, side="right"))
    straddles = bool(starts[first] < start)
    beyond = text[end : ends[last]]
    if beyond.strip():
        raise BadRow(
            f"the tokenizer's last token of {name} contains text that the chat template adds after it: {beyond!r}"
        )
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
        fix="the chat template is broken or was not written for such a conversation; use another model's tokenizer, or "
        "data.train_on=all",
    )
