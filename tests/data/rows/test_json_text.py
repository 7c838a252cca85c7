import json
from pathlib import Path

import pytest

from loratune.data.rows.files import READERS
from loratune.data.rows.formats import detect_format, to_conversations
from loratune.data.rows.json_text import RepeatedKey, parse_json
from loratune.data.rows.row import Row
from loratune.run.errors import DataError


def test_json_is_parsed_as_python_does() -> None:
    text = '{"a": [1, {"b": null}], "c": "\\u00e9", "": true}'
    assert parse_json(text) == json.loads(text)
    with pytest.raises(json.JSONDecodeError):
        parse_json('{"a": ')


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"x": {"a": 1, "b": 2, "a": 3}}]', '{"a": {}, "\\u0061": {}}'])
def test_a_key_twice_is_an_error(text: str) -> None:
    with pytest.raises(RepeatedKey, match="the key 'a' occurs twice in one object"):
        parse_json(text)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y", "text": "z"}\n', 2),
        ("a.json", '[{"text": "x"},\n {"text": "x"},\n {"text": "y", "text": "z"}]', 3),
        ("a.json", '{"data": [{"text": "y", "text": "z"}]}', 1),
    ],
)
def test_a_row_with_a_key_twice_is_refused_with_its_line(name: str, text: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(DataError, match="the key 'text' occurs twice") as error:
        READERS[file.suffix](file)
    assert error.value.line == line


CALL = '{"name": "f", "arguments": {"city": "Rome", "city": "Oslo"}}'
ARGUMENTS = '{"city": "Rome", "city": "Oslo"}'


@pytest.mark.parametrize(
    "value",
    [
        {"conversations": '[{"from": "human", "from": "gpt", "value": "x"}]'},
        {"prompt": '[{"role": "user", "role": "tool", "content": "x"}]', "completion": "y"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": f"[{CALL}]"}]},
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ARGUMENTS}}]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": json.dumps(ARGUMENTS)}}]},
            ]
        },
    ],
)
def test_json_text_in_a_field_with_a_key_twice_is_refused(value: dict[str, object]) -> None:
    row = Row(file="a.parquet", line=1, value=value)
    good, (rejected,) = to_conversations([row], detect_format([row]))
    assert not good
    assert "occurs twice in one object" in rejected.reason


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"a": 1, "a": 2}]'])
def test_a_text_with_a_key_twice_is_a_text_where_texts_are_expected(text: str) -> None:
    """A model may be taught to correct such a text, or to avoid it."""
    row = Row(file="a.jsonl", line=1, value={"prompt": text, "completion": text})
    (good,), rejected = to_conversations([row], detect_format([row]))
    assert not rejected
    assert [message["content"] for message in good.messages] == [text, text]
