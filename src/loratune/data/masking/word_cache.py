"""Byte-level tokenizers with a memory: most words of a data set come again and again, and are tokenised once.

A byte-level tokenizer cuts a text at its added tokens, cuts what lies between them into words by regular expressions,
and turns each word into tokens by itself. This does the same, and remembers the words. It does so for ASCII only, where
Python's expressions and the tokenizer's mean the same; the rest goes through the tokenizer. `Words.of` first compares
the two on random text, and refuses tokenizers that are built in another way.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers.models import BPE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REMEMBERED_WORDS, _REMEMBERED_SEGMENTS = 200_000, 4_096
_LONGEST_WORD, _LONGEST_SEGMENT = 64, 1_000  # characters; longer ones do not come again

# GPT-2's expression, which the tokenizers library has built in.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = {True: r"\p{N}", False: r"\p{N}+"}
_SAME_ON_ASCII = (None, "NFC", "NFD", "NFKC", "NFKD")
"""Normalizers that leave ASCII as it is."""

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """A text's tokens, and where each stands in it."""

    ids: npt.NDArray[np.int32]
    """[T]"""
    starts: npt.NDArray[np.int32]
    """[T] The character that token t begins in."""
    ends: npt.NDArray[np.int32]
    """[T] After the last character of token t; never falls from one token to the next."""
    decoded: str | None
    """What the tokens are as text again; None where that is known to be the text."""


class WordCachingEncoder:
    """Tokenises texts as the tokenizer would, word by word. Made by `Words.of`."""

    def __init__(self, backend: Tokenizer, stages: Sequence[re.Pattern[str]]) -> None:
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._stages = stages
        self._added = {token.content: _as_bytes([number]) for number, token in added.items()}
        # The tokenizer looks for these first, for those that are subject to normalisation in what is left.
        self._cuts = [
            _any_of([token.content for token in added.values() if token.normalized is normalized])
            for normalized in (False, True)
            if any(token.normalized is normalized for token in added.values())
        ]
        self._widths = np.zeros(max(backend.get_vocab().values()) + 1, dtype=np.int32)
        for number, token in added.items():
            self._widths[number] = len(token.content)
        self._words = _Memory(backend.model, self._widths)
        self._segments: dict[str, bytes] = {}

    @classmethod
    def of(cls, backend: Tokenizer) -> WordCachingEncoder | None:
        """For this tokenizer; None where it is not byte-level BPE, or of a form that is not known here."""
        stages = _stages(backend)
        if stages is None or not _added_tokens_are_plain(backend):
            return None
        words = cls(backend, stages)
        texts = list(_random_texts())
        expected = backend.encode_batch(texts, add_special_tokens=False)
        for tokens, encoding in zip(words(texts), expected, strict=True):
            if tokens is None:  # of a byte that the vocabulary lacks; such a text is left to the tokenizer
                continue
            if tokens.ids.tolist() != encoding.ids or tokens.ends.tolist() != _ends(encoding.offsets):
                return None
        return words

    def __call__(self, texts: Sequence[str]) -> list[Tokens | None]:
        """The tokens of each text; None where they do not give the text back, so that it needs a closer look."""
        if len(self._words) > _REMEMBERED_WORDS:
            self._words.clear()
        cut = [self._cut(text) for text in texts]
        foreign = self._encode_foreign(cut)
        return [self._tokens(segments, foreign) for segments in cut]

    def _cut(self, text: str) -> list[str]:
        """Added tokens, and the segments between them."""
        segments = [text]
        for cuts in self._cuts:
            segments = list(
                chain.from_iterable([part] if part in self._added else cuts.split(part) for part in segments)
            )
        return [segment for segment in segments if segment]

    def _encode_foreign(self, cut: Sequence[Sequence[str]]) -> dict[str, _Foreign | None]:
        """The segments that are not ASCII, through the tokenizer."""
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
            if len(self._segments) >= _REMEMBERED_SEGMENTS:
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
    """A segment that the tokenizer itself has tokenised."""

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


class _Memory(dict[str, bytes]):
    """Word → its token ids as int32. Fills the widths of the tokens that it meets."""

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
    """What matches, and what lies between."""
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


def _any_of(contents: Sequence[str]) -> re.Pattern[str]:
    """Matches any of them, the longest that fits, and keeps it when it splits."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(contents, key=len, reverse=True)))})")


def _added_tokens_are_plain(backend: Tokenizer) -> bool:
    """Whether added tokens are found wherever they stand, take no blanks with them, and decode to themselves."""
    added = backend.get_added_tokens_decoder()
    if backend.encode_special_tokens or any(t.single_word or t.lstrip or t.rstrip for t in added.values()):
        return False
    if backend.normalizer is not None and any(t.normalized and not t.content.isascii() for t in added.values()):
        return False
    decoded = backend.decode_batch([[number] for number in added], skip_special_tokens=False)
    return all(token.content and token.content == back for token, back in zip(added.values(), decoded, strict=True))


# ---- the tokenizer's way of splitting


def _stages(backend: Tokenizer) -> list[re.Pattern[str]] | None:
    """The expressions that cut a text into words, one after another; None for another kind of tokenizer."""
    model = backend.model
    byte_level = (
        isinstance(model, BPE)
        and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
        and _described(backend.decoder).get("type") == "ByteLevel"
        and _described(backend.normalizer).get("type") in _SAME_ON_ASCII
    )
    whole = _described(backend.pre_tokenizer)
    steps: list[dict[str, Any]] = whole["pretokenizers"] if whole.get("type") == "Sequence" else [whole]
    if not byte_level or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    patterns = [_pattern(step, last=number == len(steps)) for number, step in enumerate(steps, start=1)]
    compiled = [_compile(pattern) for pattern in patterns if pattern != ""]
    return None if None in patterns or None in compiled else [stage for stage in compiled if stage is not None]


def _described(part: Any) -> dict[str, Any]:
    """A part of the tokenizer, as `tokenizer.json` describes it."""
    return {} if part is None else json.loads(part.__getstate__())


def _pattern(step: dict[str, Any], *, last: bool) -> str | None:
    """What a step of the pre-tokenizer splits by; an empty text: by nothing."""
    kind = step["type"]
    if kind == "ByteLevel" and last and not step["add_prefix_space"]:
        return _GPT2 if step["use_regex"] else ""
    if kind == "Digits":
        return _DIGITS[step["individual_digits"]]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return step["pattern"]["Regex"]
    return None


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    """The expression for Python, as far as it concerns ASCII; None where that is not certain."""
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
    r"""The pattern with the ASCII characters of each `\p{…}`."""
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
    """Text of all that splits: words, contractions, numbers, blanks, line ends, punctuation, control characters."""
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
