"""Tool calls of an answer and a row's function schemas, in the form that chat templates expect."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loratune.data.rows.fields import Place, describe_value, refusal, says_nothing
from loratune.data.rows.json_text import RepeatedKey, parse_json
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MAX_DEPTH = 50
"""Nested lists and objects in the arguments of a tool call; Python's own recursion limit is about 1,000 calls."""
_ARGUMENTS = ("arguments", "parameters", "input")
_IDS = ("id", "call_id")
_CALL = frozenset(("function", "name", "type", *_ARGUMENTS, *_IDS))
_FUNCTION = frozenset(("name", *_ARGUMENTS))
_VALUES = frozenset(("default", "const", "example"))
"""Keywords of a schema whose value may be null."""


def from_json(value: Any) -> Any:
    """Parse a list or object that a table stored as JSON text; return anything else unchanged.

    Raises:
        BadRow: An object of the text has a key twice.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except RepeatedKey as error:
            raise BadRow(str(error)) from None
        except (ValueError, RecursionError):
            return value
    return value


def turns_from_json(value: Any, is_turn: Callable[[Any], bool]) -> list[Any] | None:
    """Return the messages that a table stored as JSON text; None for any other value: an answer may be JSON itself.

    Raises:
        BadRow: They are messages, and an object in them has a key twice.
    """
    try:
        parsed = from_json(value)
    except BadRow:
        if not _are_all(json.loads(value), is_turn):
            return None
        raise
    return parsed if _are_all(parsed, is_turn) else None


def _are_all(value: Any, is_turn: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def check_unicode(text: str, where: str) -> str:
    """Return the text if it is valid Unicode.

    Raises:
        BadRow: It contains half a surrogate pair, which JSON can spell and no tokenizer can read.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} is not valid Unicode: {text[error.start]!r} at character {error.start}") from None
    return text


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Check that a template can write a value as JSON: rows of tables may contain dates, and rows from strangers
    anything.

    Raises:
        BadRow: It cannot.
    """
    if isinstance(value, str):
        check_unicode(value, where)
    elif isinstance(value, dict | list):
        if depth > _MAX_DEPTH:
            raise BadRow(f"{where} is nested more than {_MAX_DEPTH} levels deep")
        for part in value.values() if isinstance(value, dict) else value:
            check_json(part, where, depth + 1)
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str):
                raise BadRow(f"{where} has a field whose name is {describe_value(name)}, not text")
            check_unicode(name, where)
    elif value is not None and not isinstance(value, bool | int | float):
        raise BadRow(f"{where} contains {describe_value(value)}, which JSON cannot represent")


def account_for(
    place: Place, fields: Mapping[str, Any], read: frozenset[str], unread: list[tuple[Place, str]], where: str
) -> None:
    """Refuse or name every field that its reader does not read.

    Args:
        place: Where the fields stand.
        fields: All fields of the row, message, call, tool or part.
        read: The names that are read.
        unread: Receives the names of the others.
        where: What has the fields, for messages.

    Raises:
        BadRow: A rule of `FIELDS` refuses a field.
    """
    if not fields.keys() <= read and (reason := refusal(place, fields, read, unread)):
        raise BadRow(f"{where} {reason}")


# ---- calls


def read_calls(calls: Any, where: str, unread: list[tuple[Place, str]]) -> list[dict[str, Any]]:
    """Read the tool calls of an answer.

    Args:
        calls: A list of calls, one call, or the JSON text of either; nothing: no calls.
        where: The message, for error messages.
        unread: Receives the fields that are not read.

    Raises:
        BadRow: A call has no name, or its arguments are not an object.
    """
    calls = from_json(calls)
    if says_nothing(calls):
        return []
    if not isinstance(calls, list):
        raise BadRow(f"{where} has tool_calls {describe_value(calls)}, not a list")
    check_unicode(json.dumps(calls, ensure_ascii=False, default=str), f"a tool call of {where}")
    return [_read_call(from_json(call), where, unread) for call in calls]


def _read_call(call: Any, where: str, unread: list[tuple[Place, str]]) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadRow(f"{where} has a tool call without a function name: {describe_value(call)}")
    function = call if says_nothing(call.get("function")) else from_json(call["function"])
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where} has a tool call without a function name: {describe_value(call)}")
    if call.get("type") not in (None, "", "function", "function_call", "tool_use", "tool_call"):
        raise BadRow(f"{where} has a tool call of type {describe_value(call['type'])}; only function calls are written")
    name = function["name"]
    if function is not call:
        account_for("call key", function, _FUNCTION, unread, f"a tool call of {where}")
        doubled = [key for key in _FUNCTION if not says_nothing(call.get(key)) and call[key] != function.get(key)]
        if doubled:
            raise BadRow(f"{where} calls {name} with {doubled[0]} next to its function, which has its own")
    account_for("call key", call, _CALL, unread, f"a tool call of {where}")
    arguments = _arguments(function, f"{where} calls {name}")
    check_json([name, arguments], f"a tool call of {where}")
    ids = [call[key] for key in _IDS if isinstance(call.get(key), str)]
    identity = {"id": check_unicode(ids[-1], where)} if ids else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def _arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    given = {key: _decoded(function[key]) for key in _ARGUMENTS if not says_nothing(_decoded(function.get(key)))}
    values = list(given.values())
    if any(value != values[0] for value in values[1:]):
        raise BadRow(f"{where} with both {' and '.join(given)}")
    arguments = values[0] if values else {}
    if not isinstance(arguments, dict):
        raise BadRow(f"{where} with {describe_value(arguments)}; arguments must be a JSON object")
    return arguments


def _decoded(value: Any) -> Any:
    """Parse JSON text, also text of text: arguments are often encoded twice."""
    for _ in range(2):
        if not isinstance(value, str):
            break
        try:
            value = parse_json(value)
        except RepeatedKey as error:
            raise BadRow(f"arguments: {error}") from None
        except (ValueError, RecursionError):
            return value if value.strip() else None
    return value


def without_storage_nulls(call: dict[str, Any], tools: tuple[dict[str, Any], ...] | None) -> dict[str, Any]:
    """Return a call without null arguments that its schema does not know: tables give every call the keys of all."""
    function = call["function"]
    if None not in function["arguments"].values():
        return call
    schema = next((t["function"] for t in tools or () if t["function"]["name"] == function["name"]), None)
    known = (schema or {}).get("parameters")
    properties = known.get("properties") if isinstance(known, dict) else None
    if not isinstance(properties, dict):
        return call
    arguments = {key: value for key, value in function["arguments"].items() if value is not None or key in properties}
    return {**call, "function": {**function, "arguments": arguments}}


# ---- schemas


def read_tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    """Read a row's function schemas, of OpenAI's APIs or of Anthropic's; None if it has none.

    Raises:
        BadRow: They are not a list of named functions, or not JSON.
    """
    tools = from_json(tools)
    if isinstance(tools, str) and tools.strip() in ("", "null"):
        return None
    if says_nothing(tools):
        return None
    tools = [from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools is {describe_value(tools)}, not a list of function schemas")
    check_json(tools, "tools")
    return tuple(_read_schema(_without_nulls(tool)) for tool in tools)


def _read_schema(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool:
        schema = {"type": "function", **tool}
    else:
        schema = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    if schema["type"] != "function":
        raise BadRow(f"tools has one of type {describe_value(schema['type'])}; only functions can be called")
    if tool.get("type") not in (None, "function", "custom") and "function" not in tool:
        raise BadRow(f"tools has one of type {describe_value(tool['type'])}; only functions can be called")
    function = schema["function"]
    if not isinstance(function, dict) or says_nothing(function.get("name")):
        raise BadRow("tools has a function without a name")
    if not isinstance(function["name"], str):
        raise BadRow("tools has a function whose name is not text")
    if "input_schema" in function and "parameters" not in function:
        function = {"parameters" if key == "input_schema" else key: value for key, value in function.items()}
        schema = {**schema, "function": function}
    return schema


def _without_nulls(value: Any, *, names: bool = False) -> Any:
    """Return a schema without keys that are null, which no schema needs and storage fills in.

    Args:
        value: The schema, or a part of it.
        names: Whether the keys are names of parameters, not keywords.
    """
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: part if key in _VALUES and not names else _without_nulls(part, names=key == "properties" and not names)
        for key, part in value.items()
        if part is not None or (key in _VALUES and not names)
    }
