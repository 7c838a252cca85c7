"""A word cache for byte-level tokenizers: most words of a dataset recur, and each is tokenized only once.

A byte-level tokenizer splits a text at its added tokens, splits the segments between them into words by regular
expressions, and turns each word into tokens independently. This does the same with a cache of words, for ASCII only,
where Python's regular expressions and the tokenizer's have the same meaning; other segments go through the tokenizer.
`WordCachingEncoder.of` first compares the two on random text, and refuses tokenizers that are built differently.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers.models import BPE

from loratune.data.masking.spans import any_of
from loratune.data.masking.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Tokenizer

_MAX_WORDS, _MAX_SEGMENTS = 200_000, 4_096
_LONGEST_WORD, _LONGEST_SEGMENT = 64, 1_000  # characters; longer ones rarely recur

# GPT-2's expression, which the tokenizers library has built in.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = {True: r"\p{N}", False: r"\p{N}+"}
_SAME_ON_ASCII = (None, "NFC", "NFD", "NFKC", "NFKD")
"""Normalizers that leave ASCII unchanged."""

_PROPERTY = re.compile(r"\\p\{(\w+)\}|\\.|\[\^?|\]", re.DOTALL)
_ASCII_OF = {
    "L": "a-zA-Z",
    "Lu": "A-Z",
    "Ll": "a-z",
    "N": "0-9",
    "Nd": "0-9",
    "P": r"!\"#%&'()*,\-./:;?@\[\\\]_{}",
    "S": r"$+<=>\^`|~",
    **dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn", "Nl", "No"), ""),
}
# How byte-level vocabularies write the bytes that are not printable.
_AS_WRITTEN = {code: chr(256 + number) for number, code in enumerate([*range(33), 127])}


class WordCachingEncoder:
    """Tokenizes texts as the tokenizer would, word by word. Made by `WordCachingEncoder.of`."""

    def __init__(self, backend: Tokenizer, stages: Sequence[re.Pattern[str]]) -> None:
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._stages = stages
        self._added = {token.content: _as_bytes([number]) for number, token in added.items()}
        # The tokenizer searches for these first, then for those that are subject to normalization in the rest.
        self._cuts = [
            re.compile(f"({any_of([t.content for t in added.values() if t.normalized is normalized]).pattern})")
            for normalized in (False, True)
            if any(token.normalized is normalized for token in added.values())
        ]
        self._widths = np.zeros(max(backend.get_vocab().values()) + 1, dtype=np.int32)
        for number, token in added.items():
            self._widths[number] = len(token.content)
        self._words = _Words(backend.model, self._widths)
        self._segments: dict[str, bytes] = {}

    @classmethod
    def of(cls, backend: Tokenizer) -> WordCachingEncoder | None:
        """Return an encoder for a tokenizer; None if that is not byte-level BPE of a known form."""
        stages = _stages(backend)
        if stages is None or not _added_tokens_are_plain(backend):
            return None
        words = cls(backend, stages)
        texts = list(_random_texts())
        expected = backend.encode_batch(texts, add_special_tokens=False)
        for tokens, encoding in zip(words(texts), expected, strict=True):
            if tokens is None:  # a byte that the vocabulary lacks: such a text is left to the tokenizer
                continue
            if tokens.ids.tolist() != encoding.ids or tokens.ends.tolist() != _ends(encoding.offsets):
                return None
        return words

    def __call__(self, texts: Sequence[str]) -> list[Tokens | None]:
        """Return the tokens of each text; None if they do not reproduce it, so that the caller must check it."""
        if len(self._words) > _MAX_WORDS:
            self._words.clear()
        cut = [self._cut(text) for text in texts]
        foreign = self._encode_foreign(cut)
        return [self._tokens(segments, foreign) for segments in cut]

    def _cut(self, text: str) -> list[str]:
        """Split a text into added tokens and the segments between them."""
        segments = [text]
        for cuts in self._cuts:
            segments = list(
                chain.from_iterable([part] if part in self._added else cuts.split(part) for part in segments)
            )
        return [segment for segment in segments if segment]

    def _encode_foreign(self, cut: Sequence[Sequence[str]]) -> dict[str, _Foreign | None]:
        """Tokenize the segments that are not ASCII with the tokenizer."""
        segments = list({s for segments in cut for s in segments if not s.isascii() and s not in self._added})
        encodings = self._backend.encode_batch(segments, add_special_tokens=False)
        decoded = self._backend.decode_batch([e.ids for e in encodings], skip_special_tokens=False)
        return {
            segment: _Foreign.of(encoding.ids, encoding.offsets, len(segment)) if back == segment else None
            for segment, encoding, back in zip(segments, encodings, decoded, strict=True)
        }

    def _tokens(self, segments: Sequence[str], foreign: dict[str, _Foreign | None]) -> Tokens | None:
        parts: list[bytes] = []
        inserted: list[tuple[int, _Foreign]] = []
        for segment in segments:
            ids = self._added.get(segment)
            if ids is None and segment.isascii():
                ids = self._segment(segment)
            elif ids is None:
                other = foreign[segment]
                if other is None:
                    return None
                inserted.append((sum(map(len, parts)) // 4, other))
                ids = other.ids
            if ids is None:
                return None
            parts.append(ids)
        return self._locate(np.frombuffer(b"".join(parts), dtype=np.int32), inserted)

    def _locate(self, ids: npt.NDArray[np.int32], inserted: Sequence[tuple[int, _Foreign]]) -> Tokens:
        widths = self._widths[ids]
        for first, segment in inserted:
            widths[first : first + len(segment.widths)] = segment.widths
        ends = np.cumsum(widths, dtype=np.int32)
        return Tokens(ids=ids, starts=ends - widths, ends=ends, decoded=None)

    def _segment(self, segment: str) -> bytes | None:
        known = self._segments.get(segment)
        if known is not None:
            return known
        try:
            ids = b"".join(map(self._words.__getitem__, self._split(segment)))
        except _LossyWordError:
            return None
        if len(segment) <= _LONGEST_SEGMENT:
            if len(self._segments) >= _MAX_SEGMENTS:
                self._segments.clear()
            self._segments[segment] = ids
        return ids

    def _split(self, segment: str) -> list[str]:
        words = [segment]
        for stage in self._stages:
            words = _split(stage, words[0]) if len(words) == 1 else [w for word in words for w in _split(stage, word)]
        return words


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A segment tokenized by the tokenizer itself."""

    ids: bytes
    widths: npt.NDArray[np.int32]
    """Characters between the end of each token and that of the token before it."""

    @classmethod
    def of(cls, ids: Sequence[int], offsets: Sequence[tuple[int, int]], length: int) -> _Foreign | None:
        ends = np.array(_ends(offsets), dtype=np.int32)
        widths = np.diff(ends, prepend=np.int32(0))
        starts = [start for start, _ in offsets]
        contiguous = bool(
            len(ends) and ends[-1] == length and (widths >= 0).all() and (starts <= np.r_[0, ends[:-1]]).all()
        )
        return cls(_as_bytes(ids), widths) if contiguous else None


class _LossyWordError(Exception):
    """The vocabulary lacks a byte of a word."""


class _Words(dict[str, bytes]):
    """Word → its token ids as int32. Sets the widths of the tokens it encounters."""

    def __init__(self, model: Any, widths: npt.NDArray[np.int32]) -> None:
        super().__init__()
        self._model = model
        self._widths = widths

    def __missing__(self, word: str) -> bytes:
        written = word.translate(_AS_WRITTEN)
        tokens = self._model.tokenize(written)
        if "".join(token.value for token in tokens) != written:
            raise _LossyWordError
        for token in tokens:
            self._widths[token.id] = len(token.value)
        ids = _as_bytes([token.id for token in tokens])
        if len(word) <= _LONGEST_WORD:
            self[word] = ids
        return ids


def _split(stage: re.Pattern[str], text: str) -> list[str]:
    """Split a text into the matches of a pattern and what is between them."""
    words: list[str] = stage.findall(text)
    if "".join(words) == text:
        return words
    words, position = [], 0
    for match in stage.finditer(text):
        words += (text[position : match.start()], match[0])
        position = match.end()
    return [word for word in (*words, text[position:]) if word]


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


def _ends(offsets: Sequence[tuple[int, int]]) -> list[int]:
    return [end for _, end in offsets]


def _added_tokens_are_plain(backend: Tokenizer) -> bool:
    """Whether added tokens match anywhere, absorb no blanks, and decode to themselves."""
    added = backend.get_added_tokens_decoder()
    if backend.encode_special_tokens or any(t.single_word or t.lstrip or t.rstrip for t in added.values()):
        return False
    if backend.normalizer is not None and any(t.normalized and not t.content.isascii() for t in added.values()):
        return False
    decoded = backend.decode_batch([[number] for number in added], skip_special_tokens=False)
    return all(token.content and token.content == back for token, back in zip(added.values(), decoded, strict=True))


# ---- the tokenizer's splitting rules


def _stages(backend: Tokenizer) -> list[re.Pattern[str]] | None:
    """Return the regular expressions that split a text into words, in order; None for another kind of tokenizer."""
    model = backend.model
    byte_level = (
        isinstance(model, BPE)
        and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
        and _described(backend.decoder).get("type") == "ByteLevel"
        and _described(backend.normalizer).get("type") in _SAME_ON_ASCII
    )
    pre_tokenizer = _described(backend.pre_tokenizer)
    steps: list[dict[str, Any]] = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    )
    if not byte_level or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    patterns = [_pattern(step, last=number == len(steps)) for number, step in enumerate(steps, start=1)]
    compiled = [_compile(pattern) for pattern in patterns if pattern != ""]
    return None if None in patterns or None in compiled else [stage for stage in compiled if stage is not None]


def _described(part: Any) -> dict[str, Any]:
    """Return a part of the tokenizer as `tokenizer.json` describes it."""
    return {} if part is None else json.loads(part.__getstate__())


def _pattern(step: dict[str, Any], *, last: bool) -> str | None:
    """Return the pattern by which a step of the pre-tokenizer splits; empty if it does not split."""
    kind = step["type"]
    if kind == "ByteLevel" and last and not step["add_prefix_space"]:
        return _GPT2 if step["use_regex"] else ""
    if kind == "Digits":
        return _DIGITS[step["individual_digits"]]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return step["pattern"]["Regex"]
    return None


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    """Compile a pattern for ASCII text in Python; None if equivalence is not certain."""
    if pattern is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled = re.compile(_ascii(pattern), re.ASCII)
    except (re.error, KeyError, FutureWarning):
        return None
    return compiled if not compiled.groups else None


def _ascii(pattern: str) -> str:
    r"""Replace each `\p{…}` of a pattern by its ASCII characters."""
    inside = False

    def replace(match: re.Match[str]) -> str:
        nonlocal inside
        if match[0] in ("[", "[^", "]"):
            inside = match[0] != "]"
        if match[1] is None:
            return match[0]
        return _ASCII_OF[match[1]] if inside else f"[{_ASCII_OF[match[1]]}]"

    return _PROPERTY.sub(replace, pattern)


def _random_texts() -> Iterator[str]:
    """Yield text of everything that splits: words, contractions, numbers, blanks, punctuation, control characters."""
    draw = random.Random(0)  # noqa: S311 - no secret
    pieces = [
        "the",
        "Hello",
        "camelCase",
        "I'm",
        "you'll",
        "IT'S",
        "12",
        "3",
        "4096",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        ", ",
        ".",
    ]
    for _ in range(200):
        words = [draw.choice(pieces) if draw.random() < 0.8 else chr(draw.randrange(128)) for _ in range(30)]
        yield "".join(words)
