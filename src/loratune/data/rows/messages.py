"""One message of a row, its tool calls, and the row's tools: checked, and in the form that chat templates expect."""

from __future__ import annotations

import difflib
import json
from typing import Any

from loratune.data.rows.conversation import ROLES, Message
from loratune.run.errors import BadRow

_ROLE_ALIASES = {"developer": "system"}

# The names in ShareGPT files; `function_call` is an answer that calls a tool.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = 50
"""Nested lists and objects in the arguments of a tool call; Python's own recursion limit is about 1,000 calls."""


def describe_value(value: Any) -> str:
    """Describe a value of a row in an error message."""
    if isinstance(value, dict):
        return f"fields {', '.join(map(str, value)) or '(none)'}"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too large or nested too deeply to show"
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def from_json(value: Any) -> Any:
    """Parse a list or object that a table stored as JSON text; return anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


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


def read_message(turn: Any, number: int) -> Message:
    """Read a message with role and content.

    Args:
        turn: The message as the row has it.
        number: Its number, from 1, for error messages.

    Raises:
        BadRow: It cannot be trained on.
    """
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is {describe_value(turn)}, not an object with role and content")
    if "role" not in turn:
        raise BadRow(f"message {number} has no role; it has {describe_value(turn)}")
    return _checked(_role(turn["role"], number), turn, turn.get("content"), number)


def read_sharegpt_message(turn: Any, number: int) -> Message:
    """Read a message with from and value; arguments and errors as `read_message`."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow(f"message {number} has no from and value; it is {describe_value(turn)}")
    role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise BadRow(f"message {number} is from {turn['from']!r}, which is not one of {', '.join(_SHAREGPT_ROLES)}")
    if turn["from"] == "function_call":
        calls = from_json(turn["value"])
        return _checked(role, {"tool_calls": calls if isinstance(calls, list) else [calls]}, None, number)
    return _checked(role, turn, turn["value"], number)


def _role(role: Any, number: int) -> str:
    role = _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role in ROLES:
        return role
    near = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"roles are {', '.join(ROLES)}"
    raise BadRow(f"message {number} has the unknown role {role!r}; {hint}")


def _checked(role: str, turn: dict[str, Any], content: Any, number: int) -> Message:
    where = f"message {number} ({role})"
    message: Message = {"role": role}
    calls = _tool_calls(turn.get("tool_calls"), where) if role == "assistant" else None
    text = _content(content, role, where, required=not calls)
    if text is not None:
        message["content"] = text
    if calls:
        message["tool_calls"] = calls
    thoughts = next((turn[name] for name in _REASONING_FIELDS if turn.get(name)), None) if role == "assistant" else None
    if thoughts is not None:
        if not isinstance(thoughts, str):
            raise BadRow(f"{where} has thoughts that are {describe_value(thoughts)}, not text")
        message["reasoning_content"] = check_unicode(thoughts, where)
    if role == "assistant" and not calls and not message["content"].strip():
        raise BadRow(f"{where} is empty: nothing to train")
    for name in ("name", "tool_call_id"):
        if isinstance(turn.get(name), str):
            message[name] = check_unicode(turn[name], where)
    trained = _is_trained(turn, where)
    if not trained or (turn.get("train") and role != "assistant"):
        message["train"] = trained  # `formats` removes it again: templates do not know this field
    return message


def _is_trained(turn: dict[str, Any], where: str) -> bool:
    """Return the message's own flag: `train`, or OpenAI's `weight`, which is 0 or 1."""
    flags = {name: turn[name] for name in ("train", "weight") if turn.get(name) is not None}
    for name, value in flags.items():
        if value not in (True, False):
            raise BadRow(f"{where} has {name} {describe_value(value)}; it must be true or false")
    return all(flags.values())


def _content(content: Any, role: str, where: str, *, required: bool) -> str | None:
    """Return the text of a message; None only for an answer that consists of tool calls."""
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        content = "".join(_text_part(part, where) for part in content)
    if content is None:
        if required:
            raise BadRow(
                f"{where} has content null" if role != "assistant" else f"{where} has content null and no tool calls"
            )
        return None
    if role == "tool" and not isinstance(content, str):
        _check_json(content, where)
        content = json.dumps(content, ensure_ascii=False)  # tool results are often recorded as the objects they were
    if not isinstance(content, str):
        raise BadRow(f"{where} has content {describe_value(content)}, not text")
    return check_unicode(content, where) if content or required else None


def _text_part(part: dict[str, Any], where: str) -> str:
    if part["type"] != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"{where} has a part of type {part['type']!r}; only text can be trained")
    return part["text"]


# ---- tools


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]] | None:
    calls = from_json(calls)
    if not calls:
        return None
    if not isinstance(calls, list):
        raise BadRow(f"{where} has tool_calls {describe_value(calls)}, not a list")
    check_unicode(json.dumps(calls, ensure_ascii=False, default=str), f"a tool call of {where}")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where} has a tool call without a function name: {describe_value(call)}")
    arguments = from_json(function.get("arguments"))
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise BadRow(
            f"{where} calls {function['name']} with {describe_value(arguments)}; arguments must be a JSON object"
        )
    _check_json([function["name"], arguments], f"a tool call of {where}")
    identity = {"id": check_unicode(call["id"], where)} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}


def read_tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    """Read a row's function schemas; None if it has none.

    Raises:
        BadRow: They are not a list of named functions, or not JSON.
    """
    tools = from_json(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools is {describe_value(tools)}, not a list of function schemas")
    schemas = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)
    if not all(isinstance(schema["function"], dict) and schema["function"].get("name") for schema in schemas):
        raise BadRow("tools has a function without a name")
    _check_json(list(schemas), "tools")
    if not all(isinstance(schema["function"]["name"], str) for schema in schemas):
        raise BadRow("tools has a function whose name is not text")
    return schemas


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    """Check that a template can write a value as JSON: rows of tables hold dates, and rows of strangers anything."""
    if isinstance(value, str):
        check_unicode(value, where)
    elif isinstance(value, dict | list):
        if depth > _MAX_DEPTH:
            raise BadRow(f"{where} is nested more than {_MAX_DEPTH} levels deep")
        for part in value.values() if isinstance(value, dict) else value:
            _check_json(part, where, depth + 1)
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str):
                raise BadRow(f"{where} has a field whose name is {describe_value(name)}, not text")
            check_unicode(name, where)
    elif value is not None and not isinstance(value, bool | int | float):
        raise BadRow(f"{where} contains {describe_value(value)}, which JSON cannot represent")
