"""Which format rows have, and what each row says or why it says nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratune.data.rows.conversation import split_thoughts
from loratune.data.rows.formats import detect_format, to_conversations
from loratune.data.rows.row import Row
from loratune.run.errors import DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def rows(*values: Any) -> list[Row]:
    return [Row(file="rows.jsonl", line=number, value=value) for number, value in enumerate(values, start=1)]


def messages(value: Any) -> list[dict[str, Any]]:
    found = rows(value)
    conversations, rejected = to_conversations(found, detect_format(found))
    assert not rejected, rejected
    return list(conversations[0].messages)


def reason(value: Any, form: str = "messages") -> str:
    conversations, rejected = to_conversations(rows(value), form)
    assert not conversations
    assert rejected[0].origin.line == 1
    return rejected[0].reason


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}


# ---- formats


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ({"messages": [USER, ANSWER], "source": "x"}, "messages"),
        ({"conversations": [USER, ANSWER]}, "messages"),
        ({"messages": json.dumps([USER, ANSWER])}, "messages"),
        ({"prompt": "Hi", "messages": [USER, ANSWER], "prompt_id": "1"}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, "sharegpt"),
        ({"prompt": "Hi", "completion": "Hello."}, "prompt_completion"),
        ({"prompt": "Hi", "response": "Hello."}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion"),
        ({"question": "Hi", "answer": "Hello."}, "prompt_completion"),
        ({"instruction": "Hi", "input": "", "output": "Hello.", "text": "Hi Hello."}, "alpaca"),
        ({"instruction": "Hi", "output": "Hello.", "messages": None}, "alpaca"),
    ],
)
def test_each_format_is_recognised_and_read(value: dict[str, Any], form: str) -> None:
    assert detect_format(rows(value)) == form
    assert messages(value) == [USER, ANSWER]


def test_plain_text_is_recognised_last() -> None:
    found = rows({"text": "Once upon a time", "id": 3})

    assert detect_format(found) == "text"
    assert to_conversations(found, "text")[0][0].text == "Once upon a time"


def test_the_format_is_decided_by_all_rows_and_the_odd_one_is_named() -> None:
    mixed = rows(*[{"messages": [USER, ANSWER]}] * 5, {"mesages": []}, {"text": "x"})

    with pytest.raises(DataError, match=r"fields mesages; 5 of 7 rows are messages") as caught:
        detect_format(mixed)
    assert (caught.value.file, caught.value.line) == ("rows.jsonl", 6)
    assert "alpaca (instruction and output)" in caught.value.fix


def test_odd_rows_are_rejected_one_by_one_when_they_may_be_skipped() -> None:
    mixed = rows({"messages": [USER, ANSWER]}, {"mesages": []}, 7)

    assert detect_format(mixed, strict=False) == "messages"
    conversations, rejected = to_conversations(mixed, "messages")
    assert len(conversations) == 1
    assert [(r.origin.line, r.reason) for r in rejected] == [
        (2, "no messages among fields mesages"),
        (3, "a row must be an object with fields, but this is int 7"),
    ]


def test_rows_of_no_format_are_an_error_even_when_rows_may_be_skipped() -> None:
    with pytest.raises(DataError, match="matches no known format: fields a, b"):
        detect_format(rows({"a": 1, "b": 2}), strict=False)


def test_rows_that_fit_two_formats_take_the_one_that_all_have() -> None:
    both = {"prompt": "Hi", "completion": "Hello.", "instruction": "Hi", "output": "Hello."}

    assert detect_format(rows(both, {"instruction": "Hi", "output": "Hello."})) == "alpaca"


# ---- contents


def test_alpaca_joins_instruction_and_input_and_takes_a_system_text() -> None:
    value = {"instruction": "Add.", "input": "2 and 3", "output": "5", "system": "Be brief."}

    assert messages(value) == [
        SYSTEM,
        {"role": "user", "content": "Add.\n\n2 and 3"},
        {"role": "assistant", "content": "5"},
    ]


def test_sharegpt_names_become_roles_and_function_calls_become_tool_calls() -> None:
    value = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
            {"from": "observation", "value": "18 C"},
            {"from": "gpt", "value": "18 C."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([{"name": "weather", "parameters": {}}]),
    }
    conversations, _ = to_conversations(rows(value), "sharegpt")

    assert conversations[0].messages == (
        SYSTEM,
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "18 C"},
        {"role": "assistant", "content": "18 C."},
    )
    assert conversations[0].tools == (TOOL,)


def test_messages_keep_tool_calls_with_arguments_as_objects() -> None:
    text_call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    result = {"role": "tool", "content": {"temperature": 18}, "tool_call_id": "1", "name": "weather"}

    assert messages(chat(USER, {"role": "assistant", "content": None, "tool_calls": [text_call]}, result, ANSWER)) == [
        USER,
        {"role": "assistant", "tool_calls": [{**CALL, "id": "1"}]},
        {"role": "tool", "content": '{"temperature": 18}', "tool_call_id": "1", "name": "weather"},
        ANSWER,
    ]


def test_text_parts_are_joined_thoughts_are_kept_and_developers_speak_as_the_system() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]

    assert messages(
        chat({**SYSTEM, "role": "developer"}, {"role": "user", "content": parts}, {**ANSWER, "thinking": "Hm."})
    ) == [SYSTEM, {"role": "user", "content": "Hi there"}, {**ANSWER, "reasoning_content": "Hm."}]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (chat(), "no messages"),
        (chat(SYSTEM), "only a system message"),
        ({"messages": "Hi"}, 'messages is str "Hi", not a list'),
        (chat("Hi"), "message 1 is str"),
        (chat({"content": "Hi"}), "message 1 has no role"),
        (
            chat(USER, {"role": "asistant", "content": "x"}),
            "message 2 has the unknown role 'asistant'; did you mean assistant?",
        ),
        (chat({"role": "alien", "content": "x"}), "roles are system, user, assistant, tool"),
        (chat({"role": "user", "content": None}), "message 1 (user) has content null"),
        (chat({"role": "user"}), "message 1 (user) has content null"),
        (chat(USER, {"role": "assistant", "content": None}), "has content null and no tool calls"),
        (chat(USER, {"role": "assistant", "content": " \n"}), "message 2 (assistant) is empty"),
        (chat({"role": "user", "content": 7}), "message 1 (user) has content int 7, not text"),
        (chat({"role": "user", "content": [{"type": "image"}]}), "part of type 'image'; only text"),
        (chat({"role": "user", "content": "\ud800"}), "not valid Unicode"),
        (chat(USER, {**ANSWER, "thinking": 7}), "thoughts that are int 7"),
        (chat(USER, {"role": "assistant", "tool_calls": [{"type": "function"}]}), "without a function name"),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}),
            "arguments must be a JSON object",
        ),
        ({**chat(USER, ANSWER), "tools": "none"}, "not a list of function schemas"),
        ({**chat(USER, ANSWER), "tools": [{"name": ""}]}, "a function without a name"),
        ({**chat(USER, ANSWER), "system": 7}, "system is int 7"),
    ],
)
def test_a_row_that_says_nothing_is_rejected_with_the_reason(value: dict[str, Any], words: str) -> None:
    assert words in reason(value)


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        ("alpaca", {"instruction": "Hi"}, "output is NoneType null, not text"),
        ("alpaca", {"instruction": "Hi", "output": "x", "input": 3}, "input is int 3"),
        ("prompt_completion", {"prompt": "Hi"}, "no prompt and completion among fields prompt"),
        ("prompt_completion", {"prompt": 3, "completion": "x"}, "prompt is int 3, neither text nor a list"),
        ("prompt_completion", {"prompt": "Hi", "completion": ""}, "message 2 (assistant) is empty"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "message 1 is from 'alien'"),
        ("sharegpt", {"conversations": [{"role": "user", "content": "x"}]}, "has no from and value"),
        ("text", {"text": ""}, "text is empty"),
        ("text", {"text": 3}, "text is int 3"),
        ("text", {"body": "x"}, "no text among fields body"),
    ],
)
def test_other_formats_reject_with_the_reason_too(form: str, value: dict[str, Any], words: str) -> None:
    assert words in reason(value, form)


def test_thoughts_are_split_from_the_answer() -> None:
    assert split_thoughts("<think>\na\n</think>\n\nb") == ("\na\n", "\n\nb")
    assert split_thoughts("a</think>b") == ("a", "b")
    assert split_thoughts("b") is None
    assert split_thoughts("The tag <think> opens and </think> closes.") is None
