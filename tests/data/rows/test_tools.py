"""Tool calls and schemas in the forms of several projects, and the nulls that tables fill in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratune.data.rows.tools import from_json, read_calls, read_tools, without_storage_nulls
from loratune.run.errors import BadRow

EXPECTED = [{"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo", "days": 2}}}]
ARGUMENTS = {"city": "Oslo", "days": 2}


@pytest.mark.parametrize(
    "call",
    [
        {"name": "rain", "arguments": ARGUMENTS},
        {"name": "rain", "parameters": ARGUMENTS},
        {"name": "rain", "input": ARGUMENTS},
        {"function": {"name": "rain", "arguments": json.dumps(ARGUMENTS)}},
        {"function": {"name": "rain", "parameters": ARGUMENTS}, "type": "function"},
        {"function": {"name": "rain", "arguments": json.dumps(json.dumps(ARGUMENTS))}},
        {"function": None, "name": "rain", "arguments": ARGUMENTS},
        {"type": "tool_use", "name": "rain", "input": ARGUMENTS},
        {"type": "function_call", "name": "rain", "arguments": json.dumps(ARGUMENTS)},
        {"function": json.dumps({"name": "rain", "arguments": ARGUMENTS})},
        {"name": "rain", "arguments": ARGUMENTS, "parameters": {}},
        {"name": "rain", "arguments": "", "parameters": json.dumps(ARGUMENTS)},
    ],
)
def test_arguments_are_read_wherever_they_stand(call: dict[str, Any]) -> None:
    unread: list[Any] = []
    assert read_calls([call], "m", unread) == EXPECTED
    assert read_calls(json.dumps([call]), "m", unread) == EXPECTED
    assert not unread


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}, "with both arguments and parameters"),
        ({"name": "f", "arguments": [1]}, "arguments must be a JSON object"),
        ({"name": "f", "arguments": "x = 1"}, "arguments must be a JSON object"),
        ({"type": "custom", "name": "f", "input": "x"}, "of type str"),
        ({"function": {"name": "f", "arguments": {}}, "arguments": {"a": 1}}, "calls f with arguments next to"),
        ("rain", "without a function name"),
    ],
)
def test_calls_that_cannot_be_read_are_refused(call: Any, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        read_calls([call], "m", [])


def test_other_keys_of_a_call_are_named_and_an_id_is_kept() -> None:
    unread: list[Any] = []
    calls = read_calls([{"id": "fc", "call_id": "c1", "name": "f", "arguments": "{}", "status": "done"}], "m", unread)
    assert calls == [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": {}}}]
    assert unread == [("call key", "status")]


@pytest.mark.parametrize("nothing", [None, "", " ", "null", "[]", [], {}])
def test_blank_tools_are_no_tools(nothing: Any) -> None:
    assert read_tools(nothing) is None


def test_schemas_of_other_apis_become_openais() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    plain = {"name": "rain", "description": "Rain", "parameters": parameters}
    expected = ({"type": "function", "function": plain},)
    assert read_tools([plain]) == expected
    assert read_tools([{"type": "function", **plain}]) == expected, "the Responses API's"
    assert read_tools([{"name": "rain", "description": "Rain", "input_schema": parameters}]) == expected, "Anthropic's"
    assert read_tools(json.dumps([json.dumps(expected[0])])) == expected
    with pytest.raises(BadRow, match="only functions"):
        read_tools([{"type": "web_search", "name": "w"}])


def test_null_keys_of_a_schema_are_absent_but_for_values() -> None:
    properties = {
        "a": {"type": "number", "minimum": None, "default": None, "enum": [1, None]},
        "b": None,
        "default": None,
    }
    tool = {"function": {"name": "f", "description": None, "parameters": {"properties": properties}}, "type": None}
    kept = {"a": {"type": "number", "default": None, "enum": [1, None]}}
    assert read_tools([tool]) == ({"type": "function", "function": {"name": "f", "parameters": {"properties": kept}}},)


def test_null_arguments_that_the_schema_does_not_know_are_absent() -> None:
    (tool,) = read_tools([{"name": "f", "parameters": {"properties": {"a": {}, "b": {}}}}]) or ()
    (call,) = read_calls([{"name": "f", "arguments": {"a": 1, "b": None, "c": None}}], "m", [])
    assert without_storage_nulls(call, (tool,))["function"]["arguments"] == {"a": 1, "b": None}
    assert without_storage_nulls(call, None) == call


def test_only_lists_and_objects_are_parsed_as_json_text() -> None:
    assert from_json('[1, {"a": 2}]') == [1, {"a": 2}]
    assert from_json("17") == "17"
    assert from_json("[link](x)") == "[link](x)"
