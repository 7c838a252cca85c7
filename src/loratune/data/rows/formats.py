"""Rows → conversations: which of the common formats the rows have, and what each row says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratune.data.rows.conversation import Conversation, Message
from loratune.data.rows.messages import (
    check_unicode,
    describe_value,
    from_json,
    read_message,
    read_sharegpt_message,
    read_tools,
)
from loratune.data.rows.row import Origin, Rejected, Row
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
    supported = "; ".join(f"{name} ({fields})" for name, fields in FORMATS.items())
    others = f"; {counts[best]} of {len(rows)} rows are {best}" if counts[best] else ""
    raise DataError(
        f"the row matches no known format: {describe_value(odd.value)}{others}",
        file=odd.file,
        line=odd.line,
        fix=f"formats are {supported}; map other column names with data.columns, correct the row, or leave such rows "
        "out with data.on_bad_row=skip",
    )


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


def to_conversations(rows: Iterable[Row], format_name: str) -> tuple[list[Conversation], list[Rejected]]:
    """Read rows of one format as conversations.

    Args:
        rows: The rows.
        format_name: A key of `FORMATS`.

    Returns:
        The valid conversations, and the reason for each row that is not one.
    """
    convert = _CONVERTERS[format_name]
    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    for row in rows:
        origin = Origin(file=row.file, line=row.line)
        try:
            if not isinstance(row.value, dict):
                raise BadRow(f"a row must be an object with fields, but this is {describe_value(row.value)}")
            conversations.append(convert(row.value, origin))
        except BadRow as bad:
            rejected.append(Rejected(origin=origin, reason=str(bad)))
    return conversations, rejected


# ---- detection


def _has(value: dict[str, Any], *names: str) -> bool:
    # Tables merged from several formats have every column, with null where a row lacks the field.
    return all(value.get(name) is not None for name in names)


def _first_turn(value: dict[str, Any], name: str) -> dict[str, Any]:
    turns = from_json(value.get(name))
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


# ---- conversion


def _read_messages(value: dict[str, Any], origin: Origin) -> Conversation:
    name = "messages" if value.get("messages") is not None or "conversations" not in value else "conversations"
    turns = _list_of_turns(value, name)
    return _conversation([read_message(turn, number) for number, turn in enumerate(turns, start=1)], value, origin)


def _read_sharegpt(value: dict[str, Any], origin: Origin) -> Conversation:
    turns = _list_of_turns(value, "conversations")
    messages = [read_sharegpt_message(turn, number) for number, turn in enumerate(turns, start=1)]
    return _conversation(messages, value, origin)


def _read_prompt_completion(value: dict[str, Any], origin: Origin) -> Conversation:
    names = next((pair for pair in _PROMPT_FIELDS if _has(value, *pair)), None)
    if names is None:
        raise BadRow(f"no prompt and completion among {describe_value(value)}")
    prompt, completion = (_turns_or_text(value[name], name) for name in names)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = turns + ([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion)
    return _conversation([read_message(turn, number) for number, turn in enumerate(turns, start=1)], value, origin)


def _read_alpaca(value: dict[str, Any], origin: Origin) -> Conversation:
    for name in ("instruction", "output"):
        if not isinstance(value.get(name), str):
            raise BadRow(f"{name} is {describe_value(value.get(name))}, not text")
    extra = value.get("input")
    if not isinstance(extra, str | None):
        raise BadRow(f"input is {describe_value(extra)}, not text")
    request = f"{value['instruction']}\n\n{extra}" if extra and extra.strip() else value["instruction"]
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": value["output"]}]
    return _conversation([read_message(turn, number) for number, turn in enumerate(turns, start=1)], value, origin)


def _read_text(value: dict[str, Any], origin: Origin) -> Conversation:
    text = value.get("text")
    if not isinstance(text, str):
        raise BadRow(
            f"text is {describe_value(text)}, not text" if "text" in value else f"no text among {describe_value(value)}"
        )
    if not text.strip():
        raise BadRow("text is empty")
    return Conversation(messages=(), tools=None, text=check_unicode(text, "text"), origin=origin)


_CONVERTERS: dict[str, Callable[[dict[str, Any], Origin], Conversation]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "prompt_completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
    "text": _read_text,
}


def _conversation(messages: list[Message], value: dict[str, Any], origin: Origin) -> Conversation:
    """Add the row's own `system` and `tools`, and check the conversation as a unit."""
    system = value.get("system")
    if isinstance(system, str) and system.strip() and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": check_unicode(system, "system")}, *messages]
    elif not isinstance(system, str | None):
        raise BadRow(f"system is {describe_value(system)}, not text")
    if not messages:
        raise BadRow("no messages")
    if all(message["role"] == "system" for message in messages):
        raise BadRow("only a system message")
    excluded, forced_trained = (
        tuple(n for n, m in enumerate(messages) if m.get("train") is flag) for flag in (False, True)
    )
    messages = [{name: part for name, part in message.items() if name != "train"} for message in messages]
    return Conversation(
        messages=tuple(messages),
        tools=read_tools(value.get("tools")),
        text=None,
        origin=origin,
        excluded=excluded,
        forced_trained=forced_trained,
    )


def _list_of_turns(value: dict[str, Any], name: str) -> list[Any]:
    if name not in value:
        raise BadRow(f"no {name} among {describe_value(value)}")
    turns = from_json(value[name])
    if not isinstance(turns, list):
        raise BadRow(f"{name} is {describe_value(turns)}, not a list of messages")
    return turns


def _turns_or_text(value: Any, name: str) -> str | list[Any]:
    value = from_json(value) if not isinstance(value, str) else value
    if not isinstance(value, str | list):
        raise BadRow(f"{name} is {describe_value(value)}, neither text nor a list of messages")
    return value
