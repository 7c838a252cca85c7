"""The names of special tokens inside texts: found, or tokenized as ordinary text.

A tokenizer reads `<|im_end|>` as the end of a turn wherever it occurs, even in a user's message. To read it as text
there and as a token where the template wrote it, both get stand-ins of the same length from Unicode's private planes:

    1. In the messages, each name is replaced by its stand-in, so that template, spans and stop tokens do not see it.
    2. In the rendered text, the remaining names are the template's. Each is replaced by another stand-in, which a copy
       of the tokenizer knows as a token; the first stand-ins become names again, which the copy reads as ordinary text.
    3. The ids of the stand-ins are replaced by those of the template's tokens. All lengths are equal, so all offsets
       hold.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tokenizers import AddedToken, Tokenizer

from loratune.data.masking.spans import any_of
from loratune.data.masking.tokens import Tokens
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from loratune.data.rows.conversation import Conversation

T = TypeVar("T")

_IN_TEXTS, _OF_THE_TEMPLATE = 0xF0000, 0x100000
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_THOUGHTS = {"<think>", "</think>"}  # part of the data, handled by `data.thinking`


def special_names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the names of all tokens that the tokenizer reads as structure, in a template or in a text."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special and token.content.strip()}
    names.update(token for token in tokenizer.all_special_tokens if token)
    return names - _THOUGHTS


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in nested lists and dictionaries, including field names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from texts_in(name)
            yield from texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_in(part)


class SpecialText:
    """Finds the names of special tokens in texts and tokenizes them as text.

    Args:
        tokenizer: A fast tokenizer.
        names: The special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: set[str]) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._names = sorted(names)
        self._hidden = {name: _stand_in(name, _IN_TEXTS + n) for n, name in enumerate(self._names)}
        known = tokenizer.get_vocab()
        unknown = tokenizer.unk_token
        self.names = any_of(names)
        self._controls = any_of(names - {unknown})  # the unknown token also replaces what cannot be written
        self._is_control = np.zeros(max(known.values(), default=0) + 1, dtype=np.bool_)
        self._is_control[[known[name] for name in names if name in known and name != unknown]] = True

    def count(self, text: str) -> int:
        """Count the special tokens that a text names."""
        return len(self._controls.findall(text))

    def count_tokens(self, tokens: Tokens) -> int:
        """Count the special tokens among tokens."""
        return int(np.count_nonzero(self._is_control[tokens.ids]))

    def hide(self, value: T) -> T:
        """Replace names by stand-ins in every text of a value.

        Raises:
            BadRow: A text already contains characters of the stand-ins' planes.
        """
        if any(_PRIVATE.search(text) for text in texts_in(value)):
            raise BadRow("a special token's name cannot be kept as text next to private-use characters")
        hidden: T = self._replaced(value)
        return hidden

    def show(self, text: str) -> str:
        """Replace stand-ins by their names."""
        for character in set(_PRIVATE.findall(text)):
            number = ord(character) - _IN_TEXTS
            if number < len(self._names):
                text = text.replace(self._hidden[self._names[number]], self._names[number])
        return text

    def tokens(self, text: str) -> Tokens:
        """Tokenize a text with stand-ins: names are special tokens, stand-ins are ordinary text.

        Raises:
            BadRow: The tokenizer cannot write these names in ordinary tokens.
        """
        ids, offsets = self._encode(text)
        without = _PRIVATE.sub("", text)
        if self._encode(without)[0] != self._backend.encode(without, add_special_tokens=False).ids:
            raise BadRow("the tokenizer cannot write the names of its special tokens as ordinary text")
        return Tokens.of(ids, offsets, self._backend.decode(ids, skip_special_tokens=False))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.names.sub(lambda match: self._hidden[match[0]], value)
        if isinstance(value, dict):
            return {self._replaced(name): self._replaced(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self._replaced, value))
        return value

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        copy, real = self._copy
        marked = self.names.sub(lambda match: _stand_in(match[0], _OF_THE_TEMPLATE + self._place[match[0]]), text)
        encoding = copy.encode(self.show(marked), add_special_tokens=False)
        return [real.get(token, token) for token in encoding.ids], encoding.offsets

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: n for n, name in enumerate(self._names)}

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy of the tokenizer that reads names as text and stand-ins as tokens, and its ids of these → the true
        ids."""
        copy = Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        copy.post_processor = None  # as in `tokens.exact_offsets`
        copy.no_truncation()
        copy.no_padding()
        real: dict[int, int] = {}
        added = {token.content: token for token in self._backend.get_added_tokens_decoder().values()}
        for n, name in enumerate(self._names):
            token = added.get(name)
            if token is None:
                continue
            stand_in = _stand_in(name, _OF_THE_TEMPLATE + n)
            settings = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
            copy.add_tokens([AddedToken(stand_in, normalized=False, **settings)])
            number, true = copy.token_to_id(stand_in), self._backend.token_to_id(name)
            assert number is not None
            assert true is not None
            real[number] = true
        return copy, real


def _stand_in(name: str, character: int) -> str:
    return chr(character) * len(name)


def special_token_in(conversation: Conversation, specials: SpecialText) -> str:
    """Describe where a text names a special token, which could start or end a turn; return "" if none does."""
    for number, message in enumerate(conversation.messages, start=1):
        plain = len(message) == 2 and "content" in message
        for text in (message["content"],) if plain else texts_in(message):
            found = specials.names.search(text)
            if found:
                return f"message {number} ({message['role']}) contains the special token {found[0]}"
    for text in texts_in(conversation.tools):
        found = specials.names.search(text)
        if found:
            return f"the tools contain the special token {found[0]}"
    return ""
