"""Every field of every row is read, refused, or named."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.rows.fields import FIELDS, Unread, is_preference_pair, refusal, says_nothing, unread_in_words
from loratune.data.rows.formats import detect_format, to_conversations
from loratune.data.rows.row import Row
from loratune.run.errors import DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
CALL = {"id": "1", "type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
CHAT: dict[str, Any] = {"messages": [USER, ANSWER]}


def read(value: Any, form: str = "messages") -> tuple[Any, str, Unread]:
    """The conversation, why it was rejected, and what was not read."""
    unread: Unread = Counter()
    conversations, rejected = to_conversations([Row(file="a", line=1, value=value)], form, unread)
    return (conversations or [None])[0], rejected[0].reason if rejected else "", unread


# ---- any field, anywhere

ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Look."}], "tool_calls": [CALL]},
            {"role": "tool", "content": "wet", "tool_call_id": "1"},
            ANSWER,
        ],
        "tools": [TOOL],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps({"name": "rain", "arguments": {}})},
            {"from": "observation", "value": "wet"},
            {"from": "gpt", "value": "Wet."},
        ]
    },
    "prompt_completion": {"prompt": [USER], "completion": [ANSWER]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "text": {"text": "Once upon a time"},
}
KNOWN = {name for field in FIELDS for name in field.names}
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab {[", min_size=1, max_size=5),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=2) | st.dictionaries(st.text("xyz", min_size=1), inner, min_size=1)
    ),
    max_leaves=4,
)
CASES = st.tuples(st.sampled_from(sorted(ROWS)), st.integers(0, 99), st.text("qwxyz_", min_size=1, max_size=6), VALUES)


def objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from objects(part)
    elif isinstance(value, list):
        for part in value:
            yield from objects(part)


def check_insertion(case: tuple[str, int, str, Any]) -> None:
    form, place, name, content = case
    row = copy.deepcopy(ROWS[form])
    before, reason, _ = read(copy.deepcopy(row), form)
    assert not reason
    found = list(objects(row))
    target = found[place % len(found)]
    target[name] = content
    after, reason, unread = read(row, form)
    named = any(field == name and count for (_, field), count in unread.items())
    if reason or named:
        return
    # neither refused nor named: the conversation must have it, as an argument of a call or a part of a schema
    assert after != before
    assert name in json.dumps([after.messages, after.tools])


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(case=CASES)
def test_an_unknown_field_anywhere_is_read_refused_or_named(case: tuple[str, int, str, Any]) -> None:
    check_insertion(case)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None, print_blob=True)
@given(case=CASES)
def test_10_000_unknown_fields_are_read_refused_or_named(case: tuple[str, int, str, Any]) -> None:
    check_insertion(case)


def test_the_check_of_unknown_fields_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.data.rows.tools.refusal", lambda *_: "")  # fields that nothing reads are forgotten
    with pytest.raises(AssertionError):
        check_insertion(("alpaca", 0, "zzz", 1))


def test_fields_that_say_nothing_are_absent() -> None:
    for nothing in (None, "", [], {}):
        assert says_nothing(nothing)
        assert read({**CHAT, "images": nothing, "zzz": nothing, "chosen": nothing})[1:] == ("", Counter())
    assert not any(map(says_nothing, (0, False, " ", [0])))


def test_what_is_not_read_is_counted_by_place_and_name() -> None:
    chat = [{**USER, "id": 1}, {**ANSWER, "id": 2, "logprobs": [1]}]
    unread: Unread = Counter()
    rows = [Row(file="a", line=n, value={"messages": chat, "source": "x"}) for n in (1, 2)]
    to_conversations([*rows, Row(file="a", line=3, value={"messages": [], "zzz": 1})], "messages", unread)

    assert unread == {("column", "source"): 2, ("message key", "id"): 4, ("message key", "logprobs"): 2}
    assert unread_in_words(unread) == "message keys id (4), logprobs (2); columns source (2)"
    assert unread_in_words({("column", f"c{n}"): 1 for n in range(14)}).endswith("c11 (1) and 2 more")


# ---- the rules


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"images": ["a.jpg"]}, "has images; only text"),
        ({"image": {"bytes": "x"}}, "has image; only text"),
        ({"audio": "a.wav"}, "has audio; only text"),
        ({"videos": ["a.mp4"]}, "has videos; only text"),
        ({"chosen": "a", "rejected": "b"}, "is a preference pair"),
        ({"rejected_response": "b"}, "is a preference pair"),
        ({"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}, "data.columns="),
        ({"label": False}, "label false, which marks a bad answer"),
        ({"label": False}, "task=preference preference.loss=kto learns from good and bad ones"),
        ({"kto_tag": False}, "kto_tag false"),
        ({"label": "False"}, "label false"),
        ({"weight": 0.1}, "weight 0.1, and rows are not weighted"),
        ({"weight": 0}, "weight 0,"),
        ({"sample_weight": 2}, "sample_weight 2"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "not passed to the chat template"),
    ],
)
def test_columns_that_change_what_a_row_is_are_refused(fields: dict[str, Any], words: str) -> None:
    assert words in read({**CHAT, **fields})[1]


def test_columns_that_change_nothing_are_named() -> None:
    harmless = {"label": True, "weight": 1, "split": "train", "rejected": "b", "context": "c", "documents": [{"a": 1}]}
    _, reason, unread = read({**CHAT, **harmless})

    assert not reason
    assert set(unread) == {("column", name) for name in harmless}
    assert read({"text": "A", "label": False, "image": "x"}, "text")[2] == {
        ("column", "label"): 1,
        ("column", "image"): 1,
    }


@pytest.mark.parametrize("flag", ["train", "trainable", "training", "loss", "weight", "loss_mask", "loss_scale"])
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_a_message_is_context_under_every_name_of_the_flag(flag: str, value: Any) -> None:
    conversation, reason, unread = read({"messages": [USER, {**ANSWER, flag: value}, USER, {**ANSWER, flag: True}]})

    assert (conversation.excluded, conversation.given, reason, unread) == ((1,), (), "", {})
    assert conversation.messages[1] == ANSWER


def test_masked_is_the_other_way_round_and_other_values_are_refused() -> None:
    assert read({"messages": [USER, {**ANSWER, "masked": True}, USER, {**ANSWER, "masked": False}]})[0].excluded == (1,)
    assert (
        "loss_mask list [1, 0]; it must be true or false"
        in read({"messages": [USER, {**ANSWER, "loss_mask": [1, 0]}]})[1]
    )
    assert "has train_detail" in read({"messages": [USER, {**ANSWER, "train_detail": [{"begin_offset": 0}]}]})[1]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("refusal", "No.", "write it as content"),
        ("tool_plan", "I look.", "reasoning_content"),
        ("channel", "analysis", "write thoughts as reasoning_content"),
        ("images", ["a.png"], "only text"),
        ("name", 7, "name int 7, not text"),
        ("reasoning_details", [{"type": "reasoning.encrypted", "data": "x"}], "without readable text"),
    ],
)
def test_what_an_answer_says_elsewhere_is_refused(key: str, value: Any, words: str) -> None:
    assert words in read({"messages": [USER, {**ANSWER, key: value}]})[1]


def test_thoughts_are_read_from_every_field_and_may_not_differ() -> None:
    details = [{"type": "reasoning.text", "text": "Hm."}]
    for extra in (
        {"reasoning": "Hm."},
        {"thinking": "Hm."},
        {"reasoning_details": details},
        {"reasoning": "Hm. ", "reasoning_details": details},
    ):
        assert read({"messages": [USER, {**ANSWER, **extra}]})[0].messages[1]["reasoning_content"].strip() == "Hm."
    assert "different thoughts" in read({"messages": [USER, {**ANSWER, "reasoning": "A", "thinking": "B"}]})[1]
    assert read({"messages": [{**USER, "reasoning": "A"}, ANSWER]})[2] == {("message key", "reasoning"): 1}


def test_system_columns_are_read_and_may_not_contradict_a_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    for name in ("system", "system_prompt"):
        assert read({**CHAT, name: "Be brief."})[0].messages[0] == system
        assert read({"messages": [system, USER, ANSWER], name: " Be brief."})[0].messages[0] == system
        assert "another system message" in read({"messages": [system, USER, ANSWER], name: "Be long."})[1]
    assert "another system message" in read({**CHAT, "system": "A", "system_prompt": "B"})[1]


def test_history_and_input_are_read() -> None:
    row = {"instruction": "And now?", "input": "x", "output": "C", "history": [["A?", "A"], ["B?", "B"]]}
    said = [message["content"] for message in read(row, "alpaca")[0].messages]
    assert said == ["A?", "A", "B?", "B", "And now?\n\nx", "C"]
    assert read({**row, "history": json.dumps(row["history"])}, "alpaca")[0] == read(row, "alpaca")[0]
    assert "not a list of pairs" in read({**row, "history": ["A?"]}, "alpaca")[1]
    question = {"question": "How many?", "input": "CREATE TABLE t", "answer": "SELECT"}
    assert read(question, "prompt_completion")[0].messages[0]["content"] == "How many?\n\nCREATE TABLE t"


def test_preference_pairs_are_called_what_they_are_before_a_format_is_found() -> None:
    rows = [Row(file="a", line=1, value={"prompt": "x", "chosen": "a", "rejected": "b"})]
    with pytest.raises(DataError, match="preference pair"):
        detect_format(rows)
    assert is_preference_pair(rows[0].value)
    assert not is_preference_pair({"prompt": "x", "chosen": "a", "rejected": None})


def test_two_texts_under_other_names_get_the_setting_that_reads_them() -> None:
    with pytest.raises(DataError) as caught:
        detect_format([Row(file="a", line=2, value={"Q": "1?", "A": "2"})])
    assert caught.value.fix.startswith("data.columns='{prompt: Q, completion: A}'")


def test_every_line_of_the_table_says_who_writes_the_field_and_what_it_means() -> None:
    assert all(field.names and field.written_by and field.meaning for field in FIELDS)
    places = Counter((field.place, name) for field in FIELDS for name in field.names)
    assert max(places.values()) == 1
    assert refusal("column", {"a": 1}, (), unread := []) == ""
    assert unread == [("column", "a")]
    assert {"loss_mask", "context", "function_call", "tool_plan", "chosen", "kto_tag", "images"} <= KNOWN


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Hello."}],
        [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello."}],
        [{"type": "reasoning", "text": "Hm."}, {"type": "output_text", "text": "Hel"}, {"type": "text", "text": "lo."}],
    ],
)
def test_parts_are_texts_and_thoughts_under_the_keys_of_several_projects(parts: list[dict[str, Any]]) -> None:
    conversation, reason, unread = read({"messages": [USER, {"role": "assistant", "content": parts}]})
    assert (reason, unread) == ("", {})
    assert conversation.messages[1] == {**ANSWER, "reasoning_content": "Hm."}
    assert "a part of type" in read({"messages": [{"role": "user", "content": parts}, ANSWER]})[1], (
        "users have no thoughts"
    )


@pytest.mark.parametrize(
    "result",
    [[{"type": "rain", "mm": 3}], {"mm": 3}, [1, 2], [{"type": "rain", "mm": 3}, {"type": "text", "text": "x"}]],
)
def test_a_tool_result_may_be_any_object(result: Any) -> None:
    turns = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": result}, ANSWER]
    conversation, reason, _ = read({"messages": turns})
    assert not reason
    assert json.loads(conversation.messages[2]["content"]) == result
    turns[2] = {"role": "tool", "content": [{"type": "image_url", "image_url": "x"}]}
    assert "only text can be trained" in read({"messages": turns})[1]
