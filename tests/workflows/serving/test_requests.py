"""Requests: nothing in them is accepted and ignored."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.workflows.serving.requests import BadRequestError, chunk, completion, header, read_request, usage

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_a_request_is_read() -> None:
    request = read_request(
        {"model": "m", "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "seed": 4, "stream": False, "n": 1}
    )
    assert (request.model, request.stream, request.with_usage) == ("m", False, False)
    assert request.messages == tuple(MESSAGES)
    sampling = request.sampling
    assert (sampling.temperature, sampling.max_new_tokens, sampling.seed) == (0, 5, 4)
    streamed = read_request(
        {"model": "m", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "tools": None}
    )
    assert (streamed.stream, streamed.with_usage, streamed.sampling.temperature) == (True, True, 1.0)
    assert read_request({"model": "m", "messages": MESSAGES, "max_completion_tokens": 3}).sampling.max_new_tokens == 3


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = read_request({"model": "m", "messages": [{"role": "user", "content": parts}]}).messages
    assert message["content"].replace("\n", "") == "ab"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "not a JSON object"),
        ({"messages": MESSAGES}, "model is missing"),
        ({"model": "m"}, "messages is not a list"),
        ({"model": "m", "messages": []}, "messages is not a list"),
        ({"model": "m", "messages": ["x"]}, "message 1 is"),
        ({"model": "m", "messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"model": "m", "messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, "nothing to answer"),
        ({"model": "m", "messages": MESSAGES, "logprobs": True}, "logprobs is not supported here"),
        ({"model": "m", "messages": MESSAGES, "tools": [{}]}, "tools is not supported here"),
        ({"model": "m", "messages": MESSAGES, "n": 2}, "n is 2; it must be 1"),
        ({"model": "m", "messages": MESSAGES, "max_tokens": 0}, "max_tokens is 0"),
        ({"model": "m", "messages": MESSAGES, "max_tokens": 1.5}, "max_tokens is 1.5, not a whole number"),
        ({"model": "m", "messages": MESSAGES, "temperature": "hot"}, "temperature is 'hot', not a number"),
        ({"model": "m", "messages": MESSAGES, "temperature": float("nan")}, "temperature is nan"),
        ({"model": "m", "messages": MESSAGES, "max_tokens": float("inf")}, "max_tokens is inf"),
        ({"model": "m", "messages": MESSAGES, "top_p": 2}, "top_p is 2; it must be 0 to 1"),
        ({"model": "m", "messages": MESSAGES, "stream": "yes"}, "stream is neither"),
        ({"model": "m", "messages": MESSAGES, "stream_options": {"x": 1}}, "stream_options"),
    ],
)
def test_what_cannot_be_used_is_named(body: Any, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        read_request(body)


def test_answers_have_openais_form() -> None:
    counts = usage([1, 2], [3])
    assert counts == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    whole = completion(header(), "m", "text", "stop", counts)
    assert (whole["object"], whole["choices"][0]["message"]["content"]) == ("chat.completion", "text")
    piece = chunk(header(), "m", {"content": "t"})
    assert (piece["object"], piece["choices"][0]["finish_reason"]) == ("chat.completion.chunk", None)
