"""Rows → validated conversations: which format the rows have, and what each of them says.

A conversation is a list of messages as chat templates expect them: `role`, `content`, and where there are any
`reasoning_content`, `tool_calls` (with arguments as a dictionary), `tool_call_id` and `name`. A message with `train: false` is only
context.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratune.data.rows.sources import Row
from loratune.recipe.recipe import Column
from loratune.run.errors import DataError, printable

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_ROLE_ALIASES = {"developer": "system"}

# The names that ShareGPT files use; `function_call` is an answer that calls a tool.
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

_PROMPT_FIELDS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
_DEEPEST = 50
"""Levels of lists and objects in the arguments of a tool; Python's own limit is about 1,000 calls."""
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

FORMATS = {
    "messages": "messages: [{role, content}, …]",
    "sharegpt": "conversations: [{from, value}, …]",
    "prompt_completion": "prompt and completion (or question and answer)",
    "alpaca": "instruction and output",
    "text": "text",
}
"""Format → the fields it is known by, in the order in which they are looked for."""


class BadRow(Exception):
    """This row cannot be trained on; the text says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a conversation was read."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One validated row."""

    messages: tuple[Message, ...]
    """Empty for plain text."""
    tools: tuple[dict[str, Any], ...] | None
    """JSON schemas of the functions that the assistant may call."""
    text: str | None
    """The row's text if it is plain text, else None."""
    origin: Origin
    excluded: tuple[int, ...] = ()
    """The messages, by their place, that the row says not to train."""
    forced_trained: tuple[int, ...] = ()
    """The messages that are no answers, by their place, that the row says to train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that cannot be trained on."""

    origin: Origin
    reason: str


def detect_format(rows: Iterable[Row], *, strict: bool = True) -> str:
    """The format that every row has.

    Args:
        rows: All rows; one odd row among thousands is found.
        strict: Whether a row without the fields of any common format is an error. Otherwise the most frequent format
            is taken, and `to_conversations` rejects the rest.

    Raises:
        DataError: There is no format that fits all rows (or, not strict, any); the first row that does not fit is named.
    """
    rows = list(rows)
    fitting = [_fitting_formats(row.value) for row in rows]
    counts = Counter(name for names in fitting for name in names)
    for name in FORMATS:
        if counts[name] == len(rows):
            return name
    best = max(FORMATS, key=lambda name: counts[name])
    if counts[best] and not strict:
        return best
    odd = next(row for row, names in zip(rows, fitting, strict=True) if best not in names or not counts[best])
    looked_for = "; ".join(f"{name} ({fields})" for name, fields in FORMATS.items())
    others = f"; {counts[best]} of {len(rows)} rows are {best}" if counts[best] else ""
    raise DataError(
        f"not a known format: {_describe(odd.value)}{others}",
        file=odd.file,
        line=odd.line,
        fix=f"formats are {looked_for}; correct the row, or leave such rows out with data.on_bad_row=skip",
    )


def rename_columns(rows: Sequence[Row], columns: Mapping[Column, str]) -> list[Row]:
    """The rows with the field names of their format, where `data.columns` says which columns these are."""
    return [_renamed(row, columns) for row in rows] if columns else list(rows)


def _renamed(row: Row, columns: Mapping[Column, str]) -> Row:
    if not isinstance(row.value, dict):
        return row
    value = {name: content for name, content in row.value.items() if name not in columns.values()}
    named = {field: row.value[column] for field, column in columns.items() if column in row.value}
    return replace(row, value={**value, **named})


def check_columns(rows: Sequence[Row], columns: Mapping[Column, str]) -> None:
    """Refuse a column that no row has.

    Raises:
        DataError: Naming those that the first row has.
    """
    for field, column in columns.items():
        if not any(isinstance(row.value, dict) and column in row.value for row in rows):
            raise DataError(
                f"data.columns reads {field} from the column {column}, which no row has",
                file=rows[0].file,
                fix=f"the first row has {_describe(rows[0].value)}",
            )


def to_conversations(rows: Iterable[Row], format: str) -> tuple[list[Conversation], list[Rejected]]:  # noqa: A002 - the recipe's word
    """Read rows as conversations of one format.

    Args:
        rows: The rows.
        format: A key of `FORMATS`.

    Returns:
        The valid conversations, and for each other row why it is not one.
    """
    convert = _CONVERTERS[format]
    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    for row in rows:
        origin = Origin(file=row.file, line=row.line)
        try:
            if not isinstance(row.value, dict):
                raise BadRow(f"a row is an object with fields, this is {_describe(row.value)}")
            conversations.append(convert(row.value, origin))
        except BadRow as bad:
            rejected.append(Rejected(origin=origin, reason=str(bad)))
    return conversations, rejected


def split_thoughts(content: str) -> tuple[str, str] | None:
    """The thoughts and the answer of `<think>thoughts</think>answer`, as written; None where there are none.

    The opening tag may be missing: templates such as DeepSeek-R1's write it into the prompt, so recorded outputs of
    those models start with the thoughts.
    """
    before, closing, answer = content.partition("</think>")
    if not closing:
        return None
    opened = before.lstrip()
    if opened.startswith("<think>"):
        return opened.removeprefix("<think>"), answer
    return None if "<think>" in before else (before, answer)


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"fields {', '.join(map(str, value)) or '(none)'}"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too large or nested too deeply to show"
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _from_json(value: Any) -> Any:
    """A list or object that a table stored as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _has(value: dict[str, Any], *names: str) -> bool:
    # Tables that were merged from several formats have every column, with null where a row has no such field.
    return all(value.get(name) is not None for name in names)


def _first_turn(value: dict[str, Any], name: str) -> dict[str, Any]:
    turns = _from_json(value.get(name))
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}


def _fitting_formats(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    turn = _first_turn(value, "conversations")
    fits = {
        "messages": _has(value, "messages") or "role" in turn,
        "sharegpt": "from" in turn,
        "prompt_completion": any(_has(value, *names) for names in _PROMPT_FIELDS),
        "alpaca": _has(value, "instruction", "output"),
        "text": isinstance(value.get("text"), str),
    }
    return {name for name, does in fits.items() if does}


# ---- formats


def _read_messages(value: dict[str, Any], origin: Origin) -> Conversation:
    name = "messages" if value.get("messages") is not None or "conversations" not in value else "conversations"
    turns = _list_of_turns(value, name)
    return _conversation([_message(turn, number) for number, turn in enumerate(turns, start=1)], value, origin)


def _read_sharegpt(value: dict[str, Any], origin: Origin) -> Conversation:
    turns = _list_of_turns(value, "conversations")
    return _conversation([_sharegpt_message(turn, number) for number, turn in enumerate(turns, start=1)], value, origin)


def _read_prompt_completion(value: dict[str, Any], origin: Origin) -> Conversation:
    names = next((pair for pair in _PROMPT_FIELDS if _has(value, *pair)), None)
    if names is None:
        raise BadRow(f"no prompt and completion among {_describe(value)}")
    prompt, completion = (_turns_or_text(value[name], name) for name in names)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = turns + ([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion)
    return _conversation([_message(turn, number) for number, turn in enumerate(turns, start=1)], value, origin)


def _read_alpaca(value: dict[str, Any], origin: Origin) -> Conversation:
    for name in ("instruction", "output"):
        if not isinstance(value.get(name), str):
            raise BadRow(f"{name} is {_describe(value.get(name))}, not text")
    extra = value.get("input")
    if not isinstance(extra, str | None):
        raise BadRow(f"input is {_describe(extra)}, not text")
    request = f"{value['instruction']}\n\n{extra}" if extra and extra.strip() else value["instruction"]
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": value["output"]}]
    return _conversation([_message(turn, number) for number, turn in enumerate(turns, start=1)], value, origin)


def _read_text(value: dict[str, Any], origin: Origin) -> Conversation:
    text = value.get("text")
    if not isinstance(text, str):
        raise BadRow(f"text is {_describe(text)}, not text" if "text" in value else f"no text among {_describe(value)}")
    if not text.strip():
        raise BadRow("text is empty")
    return Conversation(messages=(), tools=None, text=_unicode(text, "text"), origin=origin)


_CONVERTERS: dict[str, Callable[[dict[str, Any], Origin], Conversation]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "prompt_completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
    "text": _read_text,
}


def _conversation(messages: list[Message], value: dict[str, Any], origin: Origin) -> Conversation:
    """Add the row's own `system` and `tools`, and check the whole."""
    system = value.get("system")
    if isinstance(system, str) and system.strip() and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": _unicode(system, "system")}, *messages]
    elif not isinstance(system, str | None):
        raise BadRow(f"system is {_describe(system)}, not text")
    if not messages:
        raise BadRow("no messages")
    if all(message["role"] == "system" for message in messages):
        raise BadRow("only a system message")
    excluded, forced_trained = (
        tuple(n for n, m in enumerate(messages) if m.get("train") is said) for said in (False, True)
    )
    messages = [{name: part for name, part in message.items() if name != "train"} for message in messages]
    return Conversation(
        messages=tuple(messages),
        tools=_tools(value.get("tools")),
        text=None,
        origin=origin,
        excluded=excluded,
        forced_trained=forced_trained,
    )


def _list_of_turns(value: dict[str, Any], name: str) -> list[Any]:
    if name not in value:
        raise BadRow(f"no {name} among {_describe(value)}")
    turns = _from_json(value[name])
    if not isinstance(turns, list):
        raise BadRow(f"{name} is {_describe(turns)}, not a list of messages")
    return turns


def _turns_or_text(value: Any, name: str) -> str | list[Any]:
    value = _from_json(value) if not isinstance(value, str) else value
    if not isinstance(value, str | list):
        raise BadRow(f"{name} is {_describe(value)}, neither text nor a list of messages")
    return value


# ---- messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is {_describe(turn)}, not an object with role and content")
    if "role" not in turn:
        raise BadRow(f"message {number} has no role; it has {_describe(turn)}")
    return _checked(_role(turn["role"], number), turn, turn.get("content"), number)


def _sharegpt_message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow(f"message {number} has no from and value; it is {_describe(turn)}")
    role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise BadRow(f"message {number} is from {turn['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    if turn["from"] == "function_call":
        calls = _from_json(turn["value"])
        return _checked(role, {"tool_calls": calls if isinstance(calls, list) else [calls]}, None, number)
    return _checked(role, turn, turn["value"], number)


def _role(role: Any, number: int) -> str:
    role = _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role in ROLES:
        return role
    near = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(ROLES)}"
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
            raise BadRow(f"{where} has thoughts that are {_describe(thoughts)}, not text")
        message["reasoning_content"] = _unicode(thoughts, where)
    if role == "assistant" and not calls and not message["content"].strip():
        raise BadRow(f"{where} is empty: nothing to train")
    for name in ("name", "tool_call_id"):
        if isinstance(turn.get(name), str):
            message[name] = _unicode(turn[name], where)
    trained = _is_trained(turn, where)
    if not trained or (turn.get("train") and role != "assistant"):
        message["train"] = trained  # until `_conversation` takes it out: templates do not know it
    return message


def _is_trained(turn: dict[str, Any], where: str) -> bool:
    """What the message says of itself: `train`, or OpenAI's `weight`, which is 0 or 1."""
    said = {name: turn[name] for name in ("train", "weight") if turn.get(name) is not None}
    for name, value in said.items():
        if value not in (True, False):
            raise BadRow(f"{where} has {name} {_describe(value)}; it is true or false")
    return all(said.values())


def _content(content: Any, role: str, where: str, *, required: bool) -> str | None:
    """The text of a message; None only for an answer that is nothing but tool calls."""
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
        content = json.dumps(content, ensure_ascii=False)  # results of tools are recorded as the objects they were
    if not isinstance(content, str):
        raise BadRow(f"{where} has content {_describe(content)}, not text")
    return _unicode(content, where) if content or required else None


def _text_part(part: dict[str, Any], where: str) -> str:
    if part["type"] != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"{where} holds a part of type {part['type']!r}; only text can be trained")
    return part["text"]


def _unicode(text: str, where: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} is not valid Unicode: {text[error.start]!r} at character {error.start}") from None
    return text


# ---- tools


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]] | None:
    calls = _from_json(calls)
    if not calls:
        return None
    if not isinstance(calls, list):
        raise BadRow(f"{where} has tool_calls {_describe(calls)}, not a list")
    _unicode(json.dumps(calls, ensure_ascii=False, default=str), f"a tool call of {where}")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where} has a tool call without a function name: {_describe(call)}")
    arguments = _from_json(function.get("arguments"))
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise BadRow(f"{where} calls {function['name']} with {_describe(arguments)}; arguments are a JSON object")
    _check_json([function["name"], arguments], f"a tool call of {where}")
    identity = {"id": _unicode(call["id"], where)} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    tools = _from_json(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools is {_describe(tools)}, not a list of function schemas")
    schemas = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)
    if not all(isinstance(schema["function"], dict) and schema["function"].get("name") for schema in schemas):
        raise BadRow("tools holds a function without a name")
    _check_json(list(schemas), "tools")
    if not all(isinstance(schema["function"]["name"], str) for schema in schemas):
        raise BadRow("tools holds a function whose name is not text")
    return schemas


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    """What a template may write as JSON must be JSON: rows of tables hold dates, and rows of strangers anything."""
    if isinstance(value, str):
        _unicode(value, where)
    elif isinstance(value, dict | list):
        if depth > _DEEPEST:
            raise BadRow(f"{where} is nested more than {_DEEPEST} levels deep")
        for part in value.values() if isinstance(value, dict) else value:
            _check_json(part, where, depth + 1)
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str):
                raise BadRow(f"{where} has a field whose name is {_describe(name)}, not text")
            _unicode(name, where)
    elif value is not None and not isinstance(value, bool | int | float):
        raise BadRow(f"{where} holds {_describe(value)}, which JSON does not have")
