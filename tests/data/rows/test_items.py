"""Conversations in the forms of the Responses API and of Anthropic's."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from loratune.data.rows.fields import Unread
from loratune.data.rows.formats import detect_format, to_conversations
from loratune.data.rows.items import chat_messages
from loratune.data.rows.row import Row

EXPECTED = (
    {"role": "user", "content": "Rain in Oslo and Bergen?"},
    {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [
            {"type": "function", "id": "1", "function": {"name": "rain", "arguments": {"city": "Oslo"}}},
            {"type": "function", "id": "2", "function": {"name": "rain", "arguments": {"city": "Bergen"}}},
        ],
        "reasoning_content": "Two calls.",
    },
    {"role": "tool", "content": "wet", "tool_call_id": "1"},
    {"role": "tool", "content": "dry", "tool_call_id": "2"},
    {"role": "assistant", "content": "Only in Oslo."},
)
RESPONSES = [
    {"role": "user", "content": [{"type": "input_text", "text": "Rain in Oslo and Bergen?"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Two calls."}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
    {"type": "function_call", "call_id": "1", "name": "rain", "arguments": '{"city": "Oslo"}'},
    {"type": "function_call", "call_id": "2", "name": "rain", "arguments": '{"city": "Bergen"}'},
    {"type": "function_call_output", "call_id": "1", "output": "wet"},
    {"type": "function_call_output", "call_id": "2", "output": "dry"},
    {"type": "message", "role": "assistant", "content": "Only in Oslo."},
]
ANTHROPIC = [
    {"role": "user", "content": "Rain in Oslo and Bergen?"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Two calls."},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "1", "name": "rain", "input": {"city": "Oslo"}},
            {"type": "tool_use", "id": "2", "name": "rain", "input": {"city": "Bergen"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": "wet"},
            {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "dry"}]},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Only in Oslo."}]},
]


def read(turns: Any) -> tuple[Any, str, Unread]:
    row, unread = Row(file="a", line=1, value={"messages": turns}), Counter()
    assert detect_format([row]) == "messages"
    good, bad = to_conversations([row], "messages", unread)
    return (good[0].messages if good else None), (bad[0].reason if bad else ""), unread


@pytest.mark.parametrize("turns", [RESPONSES, ANTHROPIC], ids=["responses", "anthropic"])
def test_the_same_conversation_is_read_from_each_form(turns: list[Any]) -> None:
    for value in (turns, json.dumps(turns)):
        messages, reason, unread = read(value)
        assert (messages, reason, unread) == (EXPECTED, "", {})


def test_messages_that_have_roles_already_are_not_copied() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    assert chat_messages(turns) is turns


def test_thoughts_and_texts_start_a_new_answer_where_they_cannot_precede() -> None:
    later = [*RESPONSES[:1], RESPONSES[3], {"type": "reasoning", "content": "Again."}, RESPONSES[7]]
    messages, reason, _ = read(later)
    assert not reason
    assert [sorted(message) for message in messages[1:]] == [
        ["role", "tool_calls"],
        ["content", "reasoning_content", "role"],
    ]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([*RESPONSES[:1], {"type": "reasoning", "encrypted_content": "x", "summary": []}, RESPONSES[7]], "readable text"),  # noqa: E501
        ([*RESPONSES[:1], {"type": "web_search_call", "id": "x"}, RESPONSES[7], RESPONSES[2]], "web_search_call"),
        ([*ANTHROPIC[:1], {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}], "redacted"),
        ([*ANTHROPIC[:2], {"role": "user", "content": [{"type": "tool_result", "content": "x", "is_error": True}]}], "is_error"),  # noqa: E501
        ([*ANTHROPIC[:2], {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "tool_result", "content": "y"}]}], "after other parts"),  # noqa: E501
        ([*ANTHROPIC[:1], {"role": "assistant", "content": [ANTHROPIC[1]["content"][2], {"type": "text", "text": "x"}]}], "text after a tool call"),  # type: ignore[index]  # noqa: E501
        ([*ANTHROPIC[:1], {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "y"}]}], "thoughts after its text"),  # noqa: E501
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}, ANTHROPIC[3]], "only text can be trained"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_a_message_is_refused_by_name(turns: list[Any], words: str) -> None:
    assert words in read(turns)[1]


def test_what_is_left_of_an_item_is_named() -> None:
    items = [{**item, "id": "x", "status": "completed"} if "type" in item else item for item in RESPONSES]
    messages, reason, unread = read(items)
    assert not reason
    assert [message.get("content") for message in messages] == [message.get("content") for message in EXPECTED]
    assert {name for _, name in unread} == {"id", "status"}
    cached = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    assert read([{"role": "user", "content": [cached]}, ANTHROPIC[3]])[2] == {("part key", "cache_control"): 1}


SHAREGPT_CALL = json.dumps({"name": "rain", "arguments": {"city": "Oslo"}})


@pytest.mark.parametrize("name", ["function_call", "Function_Call", "FUNCTION_CALL", "tool_call"])
def test_sharegpt_calls_keep_their_other_fields_in_any_spelling(name: str) -> None:
    extra = {"train": False, "reasoning_content": "Look."}
    turns = [{"from": "human", "value": "Rain?"}, {"from": name, "value": SHAREGPT_CALL, **extra}]
    (conversation,), _ = to_conversations([Row(file="a", line=1, value={"conversations": turns})], "sharegpt")

    assert conversation.excluded == (1,)
    assert conversation.messages[1]["reasoning_content"] == "Look."
    assert conversation.messages[1]["tool_calls"][0]["function"] == {"name": "rain", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize("before", ["<think>Look.</think>\n", "<think>\nLook.\n</think>", "Look.</think>"])
def test_thoughts_before_a_sharegpt_call_are_thoughts(before: str) -> None:
    turns = [{"from": "human", "value": "Rain?"}, {"from": "function_call", "value": before + SHAREGPT_CALL}]
    (conversation,), _ = to_conversations([Row(file="a", line=1, value={"conversations": turns})], "sharegpt")
    assert conversation.messages[1]["reasoning_content"] == "Look."
    turns[1]["value"] = before + "no JSON"
    _, (bad,) = to_conversations([Row(file="a", line=1, value={"conversations": turns})], "sharegpt")
    assert "its text is not a JSON object" in bad.reason


def test_legacy_calls_and_functions_are_read() -> None:
    call = {"name": "rain", "arguments": '{"city": "Oslo"}'}
    for content in (None, "Let me look."):
        turns = [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": content, "function_call": call},
            {"role": "function", "name": "rain", "content": "wet"},
        ]
        row = Row(file="a", line=1, value={"messages": turns, "functions": [{"name": "rain"}]})
        (conversation,), _ = to_conversations([row], "messages")
        answer, result = conversation.messages[1:]
        assert answer.get("content") == content
        assert answer["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
        assert result == {"role": "tool", "content": "wet", "name": "rain"}
        assert conversation.tools == ({"type": "function", "function": {"name": "rain"}},)
    turns[1]["tool_calls"] = [{"function": call}]
    assert "both tool_calls and function_call" in read(turns)[1]
