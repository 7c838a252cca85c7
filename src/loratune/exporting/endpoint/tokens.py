"""Read log-probabilities of tokens from the answers of servers, each of which writes them in its own way.

vLLM               prompt_logprobs: [null, {"17": {"logprob": -0.1}}, …]; top_logprobs: [{"token_id:17": -0.1}]
llama.cpp          logprobs: {content: [{id: 17, logprob: -0.1, top_logprobs: [{id: 17, logprob: -0.1}, …]}]}
llama-cpp-python,
OpenAI             logprobs: {tokens: ["a"], top_logprobs: [{"a": -0.1, …}]}, by text
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

TopTokens = dict[int, float]
"""Token id → log-probability, of the likeliest tokens at one position."""


class TokenTexts:
    """Which token a server means by a text.

    A text that several tokens have, such as the half of a letter, means none of them.

    Args:
        tokenizer: The tokenizer of training.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = {}

    def id_of(self, text: str) -> int | None:
        """Return a token's id by its text; None if no token has it, or several."""
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        if not self._ids:
            self._read()
        return self._ids.get(text)

    def _read(self) -> None:
        tokenizer: Any = self._tokenizer
        vocabulary = tokenizer.get_vocab()
        ids = list(vocabulary.values())
        # A word's first token loses its blank where nothing is before it, so each is decoded behind another one.
        before = next(iter(tokenizer("a", add_special_tokens=False)["input_ids"]))
        alone = str(tokenizer.decode([before], clean_up_tokenization_spaces=False))
        pairs = tokenizer.batch_decode([[before, token] for token in ids], clean_up_tokenization_spaces=False)
        texts = [text[len(alone) :] if text.startswith(alone) else "" for text in pairs]
        counts = Counter(texts)
        self._ids = {text: token for text, token in zip(texts, ids, strict=True) if text and counts[text] == 1}


def generated_top(choice: Mapping[str, Any], texts: TokenTexts) -> TopTokens | None:
    """Return the likeliest tokens in the place of the first token that was generated; None if there are none."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return None
    content = found.get("content")
    if isinstance(content, list) and content:
        return _of_entries([content[0], *(content[0].get("top_logprobs") or [])], texts)
    top = found.get("top_logprobs")
    return _of_texts(top[0], texts) if isinstance(top, list) and top and isinstance(top[0], dict) else None


def prompt_tops(choice: Mapping[str, Any], length: int, texts: TokenTexts) -> list[TopTokens | None] | None:
    """Return the likeliest tokens in the place of each token of a prompt; None if the server does not give them.

    Args:
        choice: The server's answer.
        length: Tokens of the prompt.
        texts: Which token is meant by a text.
    """
    own = choice.get("prompt_logprobs")
    if isinstance(own, list) and len(own) == length:
        return [
            {int(token): float(value["logprob"]) for token, value in place.items()} if place else None for place in own
        ]
    found = choice.get("logprobs")
    top = found.get("top_logprobs") if isinstance(found, dict) else None
    if not isinstance(top, list) or len(top) < length:
        return None
    return [_of_texts(place, texts) if place else None for place in top[:length]]


def _of_entries(entries: Sequence[Mapping[str, Any]], texts: TokenTexts) -> TopTokens | None:
    top: TopTokens = {}
    for entry in entries:
        token = entry["id"] if "id" in entry else texts.id_of(str(entry.get("token")))
        value = entry.get("logprob")
        if token is not None and value is not None and math.isfinite(value):
            top[int(token)] = float(value)
    return top or None


def _of_texts(place: Mapping[str, float], texts: TokenTexts) -> TopTokens | None:
    known = ((texts.id_of(text), value) for text, value in place.items())
    top = {token: float(value) for token, value in known if token is not None and math.isfinite(value)}
    return top or None
