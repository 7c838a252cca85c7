"""Ask a server what it says next: in the place of tokens of an answer, and to a chat."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from loratune.exporting.endpoint.client import Endpoint, RefusedRequestError
from loratune.exporting.endpoint.tokens import TokenTexts, TopTokens, generated_top, prompt_tops

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

NUM_TOP = 20
"""Tokens asked for at each position: the most that vLLM gives unless it is started with `--max-logprobs`."""
_FEWER = 5
"""The most that OpenAI's completions give."""
SAME_ANSWER = 0.02
"""How far two answers of a server about one position may be apart, in nats: 16-bit sums differ between batches."""
_NEUTRAL = {"seed": 0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
"""Settings that some servers otherwise take from the model's files, or have of their own."""

_FORMS = tuple(product((NUM_TOP, _FEWER), (_NEUTRAL, {}), ("ids", "text", "text without BOS")))
"""How many tokens are asked for, with which settings, and how prompts are sent, in the order in which they are tried.
Some servers take text only, and some of these add the token that begins texts."""
_WAYS = ("prompt_logprobs", "echo")
"""How servers give the log-probabilities of a whole prompt at once, in the order in which they are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """A server's answer to a chat.

    Attributes:
        text: The answer, without what the server cuts off.
        ended: Whether the model ended it, and not the limit of tokens.
        num_prompt_tokens: The tokens of the prompt; None if the server does not count them.
    """

    text: str
    ended: bool
    num_prompt_tokens: int | None


class EndpointReader:
    """Asks a server for the model that it serves.

    Args:
        endpoint: The server, with its model chosen.
        tokenizer: The tokenizer of training.

    Attributes:
        way: How it gives log-probabilities: `prompt_logprobs`, `echo`, `one token at a time`, or empty for not at all.
    """

    way = ""
    _refused = False

    def __init__(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        self._endpoint = endpoint
        self._tokenizer: Any = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._forms = list(_FORMS)
        self._settings: Mapping[str, Any] = _NEUTRAL

    def choose_way(self, input_ids: Sequence[int], position: int) -> None:
        """Find out how the server gives log-probabilities.

        What it reports about the tokens of a prompt is only trusted if it reports the same when that token is to be
        generated: some servers shift these by one.

        Args:
            input_ids: An example.
            position: A position in it, at least 1, that predicts a token.
        """
        one = self._step(input_ids, position)
        while one is None and len(self._forms) > 1 and self._refused:
            self._forms.pop(0)
            one = self._step(input_ids, position)
        if one is None:
            self._forms = list(_FORMS)
            return
        self.way = "one token at a time"
        for way in _WAYS:
            whole = self._whole(way, input_ids)
            if whole is not None and _agree(whole[position + 1], one):
                self.way = way
                return

    def tops(self, input_ids: Sequence[int], positions: Sequence[int]) -> list[TopTokens | None]:
        """Return the likeliest tokens after each position; None for a position that the server reads differently."""
        whole = self._whole(self.way, input_ids) if self.way in _WAYS else None
        if whole is not None:
            return [whole[position + 1] for position in positions]
        return [self._step(input_ids, position) for position in positions]

    def _step(self, input_ids: Sequence[int], position: int) -> TopTokens | None:
        """Have one token generated, and return the likeliest in its place."""
        choice = self._complete(list(input_ids[: position + 1]), {"logprobs": self._forms[0][0]})
        return None if choice is None else generated_top(choice, self._texts)

    def _whole(self, way: str, input_ids: Sequence[int]) -> list[TopTokens | None] | None:
        num_top = self._forms[0][0]
        extra = {"prompt_logprobs": num_top} if way == "prompt_logprobs" else {"echo": True, "logprobs": num_top}
        choice = self._complete(list(input_ids), extra)
        return None if choice is None else prompt_tops(choice, len(input_ids), self._texts)

    def _complete(self, ids: list[int], extra: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the completion of a prompt by one token; None if the server refuses, or reads other tokens.

        Token ids are sent to servers that take them, to others text, whose tokens they must count as we do.
        """
        _, settings, form = self._forms[0]
        prompt = ids if form == "ids" else self._as_text(ids, without_bos=form != "text")
        self._refused = prompt is None
        if prompt is None:
            return None
        names = {"return_tokens_as_token_ids": True} if settings else {}
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **settings, **names, **extra}
        try:
            found = self._endpoint.post("/v1/completions", {"model": self._endpoint.model, **body})
        except RefusedRequestError as error:
            self._refused = error.status not in (404, 405, 501)
            return None
        count = (found.get("usage") or {}).get("prompt_tokens")
        self._refused = count not in (None, len(ids))  # it reads other tokens: another form may be the right one
        choices = found.get("choices")
        return dict(choices[0]) if choices and not self._refused else None

    def _as_text(self, ids: list[int], *, without_bos: bool) -> str | None:
        """Return the text that the server must tokenize to these ids; None if there is none."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if self._tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            return None
        bos = self._tokenizer.bos_token
        if without_bos:
            return text.removeprefix(bos) if bos and text.startswith(bos) else None
        return text

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int] | None:
        """Return the token ids of a chat by the server's own template; None if it does not report them."""
        try:  # vLLM
            found = self._endpoint.post("/tokenize", {"model": self._endpoint.model, "messages": list(messages)})
            if found.get("tokens"):
                return [int(token) for token in found["tokens"]]
        except RefusedRequestError:
            pass
        try:  # llama.cpp
            model = {"model": self._endpoint.model}
            prompt = self._endpoint.post("/apply-template", {**model, "messages": list(messages)})["prompt"]
            body = {**model, "content": prompt, "add_special": True, "parse_special": True}
            return [int(token) for token in self._endpoint.post("/tokenize", body)["tokens"]]
        except (RefusedRequestError, KeyError):
            return None

    def chat(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> ChatAnswer | None:
        """Have a chat answered greedily; None if the server does not support chats."""
        while True:
            body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0, **self._settings}
            try:
                found = self._endpoint.post("/v1/chat/completions", {"model": self._endpoint.model, **body})
            except RefusedRequestError as error:
                if error.status in (404, 405, 501) or not self._settings:
                    return None
                self._settings = {}
                continue
            choice = (found.get("choices") or [{}])[0]
            message = choice.get("message") or {}
            count = (found.get("usage") or {}).get("prompt_tokens")
            return ChatAnswer(
                text=f"{message.get('reasoning_content') or ''}{message.get('content') or ''}",
                ended=choice.get("finish_reason") == "stop",
                num_prompt_tokens=None if count is None else int(count),
            )


def _agree(first: TopTokens | None, second: TopTokens) -> bool:
    """Return whether two lists of the same position say the same."""
    if not first:
        return False
    common = first.keys() & second.keys()
    top = max(second, key=second.__getitem__)
    return top in common and all(abs(first[token] - second[token]) < SAME_ANSWER for token in common)
