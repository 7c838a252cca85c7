"""Reads requests for chat completions, and writes answers in OpenAI's form."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.data.rows.formats import read_turns
from loratune.evaluation.sampling import Sampling
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_MAX_TOKENS = 512
"""The longest answer of a request that names no limit."""
_NUMBERS: Mapping[str, tuple[type, float, float]] = {
    "max_tokens": (int, 1, 2**31),
    "max_completion_tokens": (int, 1, 2**31),
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 2**31),
    "seed": (int, -(2**63), 2**63),
    "n": (int, 1, 1),
}
_OTHERS = frozenset(("model", "messages", "stream", "stream_options", "user"))


class BadRequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: The HTTP status of the answer.
        reason: What is wrong with it.
    """

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A request for an answer.

    Attributes:
        model: The model's name.
        messages: The conversation, in loratune's form.
        sampling: How tokens are chosen; `max_new_tokens` is the request's limit.
        stream: Whether the answer is wanted in pieces.
        with_usage: Whether a streamed answer ends with the number of tokens.
    """

    model: str
    messages: tuple[dict[str, Any], ...]
    sampling: Sampling
    stream: bool
    with_usage: bool


def read_request(body: Any) -> ChatRequest:
    """Read the body of a request.

    Raises:
        BadRequestError: It has a field that is not known, or a value that cannot be used.
    """
    if not isinstance(body, dict):
        raise BadRequestError("the body is not a JSON object")
    # Clients send null, false or nothing at all for what they do not want.
    fields = {name: value for name, value in body.items() if value is not None and value is not False}
    unknown = sorted(fields.keys() - _NUMBERS.keys() - _OTHERS)
    if unknown:
        known = ", ".join(sorted(_OTHERS | _NUMBERS.keys()))
        raise BadRequestError(f"{unknown[0]} is not supported here; these fields are: {known}")
    numbers = {name: _number(name, fields[name]) for name in _NUMBERS if name in fields}
    if not isinstance(fields.get("model"), str):
        raise BadRequestError("model is missing")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise BadRequestError("stream_options is not an object with include_usage")
    if fields.get("stream", True) is not True:
        raise BadRequestError("stream is neither true nor false")
    limits = [int(numbers[name]) for name in ("max_completion_tokens", "max_tokens") if name in numbers]
    return ChatRequest(
        model=fields["model"],
        messages=_messages(fields.get("messages")),
        sampling=Sampling(
            temperature=numbers.get("temperature", 1.0),
            top_p=numbers.get("top_p", 1.0),
            top_k=int(numbers.get("top_k", 0)),
            max_new_tokens=limits[0] if limits else DEFAULT_MAX_TOKENS,
            seed=int(numbers["seed"]) if "seed" in numbers else random.getrandbits(48),
        ),
        stream="stream" in fields,
        with_usage=options.get("include_usage") is True,
    )


def _number(name: str, value: Any) -> float:
    kind, low, high = _NUMBERS[name]
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value % 1):
        raise BadRequestError(f"{name} is {value!r}, not {wanted}")
    if not low <= value <= high:
        raise BadRequestError(f"{name} is {value}; it must be {low:g}{'' if low == high else f' to {high:g}'}")
    return value


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise BadRequestError("messages is not a list of messages")
    unread: list[Any] = []
    try:
        messages = read_turns(value, unread)
    except BadRow as bad:
        raise BadRequestError(str(bad)) from None
    if unread:
        raise BadRequestError(f"a field of a message is not read: {unread[0][1]}")
    if messages[-1]["role"] == "assistant":
        raise BadRequestError("the last message is the assistant's; there is nothing to answer")
    return tuple(messages)


def completion(answer: Mapping[str, Any], model: str, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
    """Return a complete answer. `answer` is its `header`."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
        "logprobs": None,
    }
    return {**answer, "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}


def chunk(answer: Mapping[str, Any], model: str, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """Return a piece of a streamed answer. `answer` is its `header`."""
    choices = [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
    return {**answer, "object": "chat.completion.chunk", "model": model, "choices": choices}


def header() -> dict[str, Any]:
    """Return what all pieces of an answer have in common."""
    return {"id": f"chatcmpl-{random.getrandbits(96):024x}", "created": int(time.time())}


def usage(prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, int]:
    """Return the numbers of tokens of a request, as OpenAI counts them."""
    return {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(tokens),
        "total_tokens": len(prompt) + len(tokens),
    }


def error_body(reason: str, kind: str) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    return {"error": {"message": reason, "type": kind, "param": None, "code": None}}
