"""Rows → conversations: which of the common formats the rows have, and what each row says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratune.data.rows.conversation import Conversation, Message
from loratune.data.rows.fields import PAIR, PAIR_FIX, Place, Unread, describe_value, is_preference_pair, says_nothing
from loratune.data.rows.items import chat_messages
from loratune.data.rows.messages import read_message, read_sharegpt_message
from loratune.data.rows.row import Origin, Rejected, Row
from loratune.data.rows.tools import (
    account_for,
    check_unicode,
    from_json,
    read_tools,
    turns_from_json,
    without_storage_nulls,
)
from loratune.run.errors import BadRow, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loratune.recipe.recipe import Column

FORMATS = {
    "messages": "messages: [{role, content}, …]",
    "sharegpt": "conversations: [{from, value}, …]",
    "prompt_completion": "prompt and completion (or question and answer)",
    "alpaca": "instruction and output",
    "text": "text",
}
"""Format → the fields it is recognized by, in the order in which formats are tried."""

_PROMPT_FIELDS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def detect_format(rows: Iterable[Row], *, strict: bool = True) -> str:
    """Return the format that every row has.

    Args:
        rows: All rows, so that one odd row among thousands is found.
        strict: Whether a row without the fields of a common format is an error. Otherwise the most frequent format is
            returned, and `to_conversations` rejects the rows that do not have it.

    Raises:
        DataError: No format fits all rows (if not strict: any row); names the first row that does not fit.
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
    if isinstance(odd.value, dict) and is_preference_pair(odd.value):
        problem = f"the row {PAIR}, which matches no format of conversations"
        raise DataError(problem, file=odd.file, line=odd.line, fix=PAIR_FIX)
    supported = "; ".join(f"{name} ({fields})" for name, fields in FORMATS.items())
    others = f"; {counts[best]} of {len(rows)} rows are {best}" if counts[best] else ""
    raise DataError(
        f"the row matches no known format: {describe_value(odd.value)}{others}",
        file=odd.file,
        line=odd.line,
        fix=f"{_columns_advice(odd.value)}; correct the row, or leave such rows out with data.on_bad_row=skip; "
        f"formats are {supported}",
    )


def _columns_advice(value: Any) -> str:
    """Name the setting that reads other columns, for a row of two texts with their names."""
    texts = [name for name, text in value.items() if isinstance(text, str)] if isinstance(value, dict) else []
    if len(texts) != 2:
        return "map other column names with data.columns"
    return f"data.columns='{{prompt: {texts[0]}, completion: {texts[1]}}}' reads these two"


def rename_columns(rows: Sequence[Row], columns: Mapping[Column, str]) -> list[Row]:
    """Rename the columns that `data.columns` maps to the field names of the format."""
    return [_renamed(row, columns) for row in rows] if columns else list(rows)


def _renamed(row: Row, columns: Mapping[Column, str]) -> Row:
    if not isinstance(row.value, dict):
        return row
    value = {name: content for name, content in row.value.items() if name not in columns.values()}
    named = {field: row.value[column] for field, column in columns.items() if column in row.value}
    return replace(row, value={**value, **named})


def check_columns(rows: Sequence[Row], columns: Mapping[Column, str]) -> None:
    """Check that every column of `data.columns` occurs in some row.

    Raises:
        DataError: A column occurs in none; names the columns of the first row.
    """
    for field, column in columns.items():
        if not any(isinstance(row.value, dict) and column in row.value for row in rows):
            raise DataError(
                f"data.columns reads {field} from the column {column}, which no row has",
                file=rows[0].file,
                fix=f"the first row has {describe_value(rows[0].value)}",
            )


def to_conversations(
    rows: Iterable[Row], format_name: str, unread: Unread | None = None
) -> tuple[list[Conversation], list[Rejected]]:
    """Read rows of one format as conversations.

    Args:
        rows: The rows.
        format_name: A key of `FORMATS`.
        unread: Receives the fields of the valid rows that are not read.

    Returns:
        The valid conversations, and the reason for each row that is not one.
    """
    convert = _CONVERTERS[format_name]
    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    for row in rows:
        origin = Origin(file=row.file, line=row.line)
        found: list[tuple[Place, str]] = []
        try:
            if not isinstance(row.value, dict):
                raise BadRow(f"a row must be an object with fields, but this is {describe_value(row.value)}")
            conversations.append(convert(row.value, origin, found))
        except BadRow as bad:
            rejected.append(Rejected(origin=origin, reason=str(bad)))
        else:
            if found and unread is not None:
                unread.update(found)
    return conversations, rejected


# ---- detection


def _has(value: dict[str, Any], *names: str) -> bool:
    # Tables merged from several formats have every column, with null where a row lacks the field.
    return all(value.get(name) is not None for name in names)


def _first_turn(value: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        turns = from_json(value.get(name))
    except BadRow:  # a key twice, which is told when the row is read
        turns = json.loads(value[name])
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}


def _fitting_formats(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    turn = _first_turn(value, "conversations") if "conversations" in value else {}
    fits = {
        "messages": _has(value, "messages") or "role" in turn,
        "sharegpt": "from" in turn,
        "prompt_completion": any(_has(value, *names) for names in _PROMPT_FIELDS),
        "alpaca": _has(value, "instruction", "output"),
        "text": isinstance(value.get("text"), str),
    }
    return {name for name, does in fits.items() if does}


# ---- conversion

_Unread = list[tuple[Place, str]]
_COMMON = frozenset(("system", "system_prompt", "tools", "functions"))


def _read_messages(value: dict[str, Any], origin: Origin, unread: _Unread) -> Conversation:
    name = "messages" if value.get("messages") is not None or "conversations" not in value else "conversations"
    messages = read_turns(_list_of_turns(value, name), unread)
    return as_conversation(messages, value, origin, unread, read=frozenset((name,)))


def _read_sharegpt(value: dict[str, Any], origin: Origin, unread: _Unread) -> Conversation:
    turns = _list_of_turns(value, "conversations")
    messages = [read_sharegpt_message(turn, number, unread) for number, turn in enumerate(turns, start=1)]
    return as_conversation(messages, value, origin, unread, read=frozenset(("conversations",)))


def _read_prompt_completion(value: dict[str, Any], origin: Origin, unread: _Unread) -> Conversation:
    names = next((pair for pair in _PROMPT_FIELDS if _has(value, *pair)), None)
    if names is None:
        raise BadRow(f"no prompt and completion among {describe_value(value)}")
    prompt, completion = (_turns_or_text(value[name], name) for name in names)
    turns = [{"role": "user", "content": with_input(prompt, value)}] if isinstance(prompt, str) else prompt
    answers = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    given = read_turns(turns, unread)
    messages = continued(given, read_turns(answers, unread, first=len(given) + 1))
    read = frozenset((*names, "input") if isinstance(prompt, str) else names)
    return as_conversation(messages, value, origin, unread, read=read)


def continued(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """Join prompt and completion: answers in a prompt are context, and an answer that the prompt starts is
    continued."""
    if not prompt or not completion or prompt[-1]["role"] != "assistant" or completion[0]["role"] != "assistant":
        return [*map(as_given, prompt), *completion]
    start, rest = prompt[-1], completion[0]
    if start.keys() - {"role", "content", "train"} or "reasoning_content" in rest or "content" not in rest:
        raise BadRow(
            f"message {len(prompt)} (assistant) ends the prompt, and the completion cannot continue it: only text "
            "that is followed by text is one answer"
        )
    joined = {**rest, "content": start["content"] + rest["content"], "started": start["content"]}
    return [*map(as_given, prompt[:-1]), joined, *completion[1:]]


def as_given(message: Message) -> Message:
    return {**message, "given": True} if message["role"] == "assistant" else message


def with_input(text: str, value: dict[str, Any]) -> str:
    extra = value.get("input")
    if not isinstance(extra, str | None):
        raise BadRow(f"input is {describe_value(extra)}, not text")
    return f"{text}\n\n{extra}" if extra and extra.strip() else text


def _read_alpaca(value: dict[str, Any], origin: Origin, unread: _Unread) -> Conversation:
    for name in ("instruction", "output"):
        if not isinstance(value.get(name), str):
            raise BadRow(f"{name} is {describe_value(value.get(name))}, not text")
    turns = [*_history(value.get("history")), {"role": "user", "content": with_input(value["instruction"], value)}]
    messages = read_turns([*turns, {"role": "assistant", "content": value["output"]}], unread)
    return as_conversation(messages, value, origin, unread, read=_ALPACA)


_ALPACA = frozenset(("instruction", "input", "output", "history"))


def _history(history: Any) -> list[Message]:
    """Return the earlier turns of an Alpaca row: pairs of what the user and the assistant said."""
    history = from_json(history)
    if says_nothing(history):
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise BadRow(f"history is {describe_value(history)}, not a list of pairs of texts")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _read_text(value: dict[str, Any], origin: Origin, unread: _Unread) -> Conversation:
    text = value.get("text")
    if not isinstance(text, str):
        raise BadRow(
            f"text is {describe_value(text)}, not text" if "text" in value else f"no text among {describe_value(value)}"
        )
    if not text.strip():
        raise BadRow("text is empty")
    unread += [("column", str(name)) for name, content in value.items() if name != "text" and not says_nothing(content)]
    return Conversation(messages=(), tools=None, text=check_unicode(text, "text"), origin=origin)


_CONVERTERS: dict[str, Callable[[dict[str, Any], Origin, _Unread], Conversation]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "prompt_completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
    "text": _read_text,
}
_NOTES = frozenset(("train", "given", "started"))
"""Keys by which the readers of messages say what templates do not know."""


def as_conversation(
    messages: list[Message], value: dict[str, Any], origin: Origin, unread: _Unread, *, read: frozenset[str]
) -> Conversation:
    """Add the row's own system message and tools, and check the conversation as a unit.

    Args:
        messages: The messages, with the notes `train`, `given` and `started`.
        value: The row.
        origin: Where it was read.
        unread: Receives the fields of the row that are not read.
        read: The fields that its reader reads.

    Raises:
        BadRow: It cannot be trained on.
    """
    account_for("column", value, read | _COMMON, unread, "the row")
    messages = _with_system(messages, value)
    if not messages:
        raise BadRow("no messages")
    if all(message["role"] == "system" for message in messages):
        raise BadRow("only a system message")
    tools = _tools(value)
    plain = [m if _NOTES.isdisjoint(m) else {k: part for k, part in m.items() if k not in _NOTES} for m in messages]
    if tools:
        for number, message in enumerate(plain):
            if "tool_calls" in message:
                calls = [without_storage_nulls(call, tools) for call in message["tool_calls"]]
                plain[number] = {**message, "tool_calls": calls}
    if all(map(_NOTES.isdisjoint, messages)):
        return Conversation(messages=tuple(plain), tools=tools, text=None, origin=origin)
    given = tuple(n for n, message in enumerate(messages) if message.get("given"))
    return Conversation(
        messages=tuple(plain),
        tools=tools,
        text=None,
        origin=origin,
        excluded=tuple(n for n, m in enumerate(messages) if m.get("train") is False or n in given),
        forced_trained=tuple(n for n, m in enumerate(messages) if m.get("train") is True),
        given=given,
        started=next(((n, m["started"]) for n, m in enumerate(messages) if "started" in m), None),
    )


def _with_system(messages: list[Message], value: dict[str, Any]) -> list[Message]:
    for name in ("system", "system_prompt"):
        text = value.get(name)
        if not isinstance(text, str | None):
            raise BadRow(f"{name} is {describe_value(text)}, not text")
        if not text or not text.strip():
            continue
        own = next((m["content"] for m in messages if m["role"] == "system"), None)
        if own is not None and own.strip() != text.strip():
            raise BadRow(f"{name} is {describe_value(text)}, but the row has another system message")
        if own is None:
            messages = [{"role": "system", "content": check_unicode(text, name)}, *messages]
    return messages


def _tools(value: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools, functions = (read_tools(value[name]) if name in value else None for name in ("tools", "functions"))
    if tools and functions and tools != functions:
        raise BadRow("the row has both tools and functions, which differ")
    return tools or functions


def _list_of_turns(value: dict[str, Any], name: str) -> list[Any]:
    if name not in value:
        raise BadRow(f"no {name} among {describe_value(value)}")
    turns = from_json(value[name])
    if not isinstance(turns, list):
        raise BadRow(f"{name} is {describe_value(turns)}, not a list of messages")
    return turns


def read_turns(turns: list[Any], unread: _Unread, first: int = 1) -> list[Message]:
    """Read messages of any form; `first` is the number of the first one.

    Raises:
        BadRow: One of them cannot be trained on.
    """
    return [
        (read_sharegpt_message if isinstance(turn, dict) and "from" in turn and "role" not in turn else read_message)(
            turn, number, unread
        )
        for number, turn in enumerate(chat_messages(turns), start=first)
    ]


def _turns_or_text(value: Any, name: str) -> str | list[Any]:
    turns = value if isinstance(value, list) else turns_from_json(value, _is_turn)
    if turns is not None:
        return turns
    if not isinstance(value, str):
        raise BadRow(f"{name} is {describe_value(value)}, neither text nor a list of messages")
    return value


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)
