"""Rows with a better and a worse answer → pairs of conversations, by one rule.

An answer is a text, a message, or a list of messages. A list that begins with an assistant's message continues the
row's prompt, as a text and a message do; any other list is a whole conversation with its own prompt. The prompt is
everything that the two conversations have in common: its answers are context, the assistant's messages after it are
trained. Where they part, both must go on with the assistant.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.data.rows.conversation import Conversation, Message, has_text
from loratune.data.rows.fields import Place, Unread, describe_value, says_nothing
from loratune.data.rows.formats import as_conversation, as_given, continued, read_turns, with_input
from loratune.data.rows.reading import Converted, Reader, ReadSide
from loratune.data.rows.row import Origin, Rejected, Row
from loratune.data.rows.tools import from_json, turns_from_json
from loratune.run.errors import BadRow
from loratune.workflows.tasks.preference.judged_rows import is_judged

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loratune.recipe.recipe import Source

PROMPTS = ("prompt", "conversations", "messages", "question", "instruction")
"""Fields that may hold the prompt, in the order in which they are looked for; the first that says something counts."""

SIDES = ("chosen", "rejected")

KTO_FIX = "preference.loss=kto"
"""What trains rows with one answer and a label."""

_NOTES = frozenset(("given", "started"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One validated row: the same prompt with two answers."""

    chosen: Conversation
    rejected: Conversation
    origin: Origin

    @property
    def sides(self) -> tuple[Conversation, Conversation]:
        """The conversation with the better answer, and that with the worse one."""
        return self.chosen, self.rejected

    @property
    def key(self) -> int:
        """A key that is equal for pairs with the same content."""
        text = json.dumps([[side.messages, side.tools] for side in self.sides], sort_keys=True)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


@dataclass(frozen=True, slots=True)
class _Written:
    """A row, read as far as its fields: the prompt and both answers as lists of what may be messages."""

    prompt: list[Any] | None
    answers: tuple[list[Any], list[Any]]
    value: dict[str, Any]
    """The fields that a conversation may have besides (system message, tools)."""
    read: frozenset[str]
    form: str


def read_pairs(read: Reader, sources: Sequence[Source]) -> ReadSide[Pair]:
    """Read the rows of sources as pairs.

    Raises:
        DataError: A row is not a pair, and `data.on_bad_row` is `error`.
    """

    def convert(source: Source, rows: list[Row]) -> Converted[Pair]:  # noqa: ARG001 - the signature of all readers
        return to_pairs(rows)

    return read.read(sources, convert, lambda pair: pair.key)


def to_pairs(rows: Iterable[Row]) -> Converted[Pair]:
    """Read rows as pairs; give the reason for each that is not one."""
    pairs: list[Pair] = []
    rejected: list[Rejected] = []
    forms: dict[str, None] = {}
    unread: Unread = Unread()
    for row in rows:
        origin = Origin(file=row.file, line=row.line)
        found: list[tuple[Place, str]] = []
        try:
            written = _written(row.value)
            pairs.append(_pair(written, origin, found))
        except BadRow as bad:
            rejected.append(Rejected(origin=origin, reason=str(bad)))
        else:
            forms[written.form] = None
            unread.update(found)
    return Converted(format=", ".join(forms), items=pairs, rejected=rejected, unread=unread)


# ---- fields


def _written(value: Any) -> _Written:
    """Find prompt and answers among the fields of a row."""
    if not isinstance(value, dict):
        raise BadRow(f"a row must be an object with fields, but this is {describe_value(value)}")
    if not says_nothing(value.get("non_preferred_output")):
        return _written_by_openai(value)
    if says_nothing(value.get("chosen")) and not says_nothing(value.get("rejected_response")):
        return _written_by_ms_swift(value)
    for side, other in (SIDES, SIDES[::-1]):
        if says_nothing(value.get(side)):
            raise BadRow(
                f"{side} is empty, and {other} is not: a pair has two answers"
                if not says_nothing(value.get(other))
                else f"no chosen and rejected among {describe_value(value)}"
                + (f"; rows with one answer and a label are for {KTO_FIX}" if is_judged(value) else "")
            )
    asked = next((field for field in PROMPTS if not says_nothing(value.get(field))), None)
    prompt = None if asked is None else _turns(value[asked], asked, "user", value)
    read = {*SIDES, *([asked] if asked else [])}
    if asked is not None and isinstance(value[asked], str):
        read.add("input")
    chosen, rejected = (_turns(value[side], side, "assistant") for side in SIDES)
    form = f"{asked}, chosen and rejected" if asked else "chosen and rejected"
    return _Written(prompt, (chosen, rejected), value, frozenset(read), form)


def _written_by_openai(value: dict[str, Any]) -> _Written:
    inputs = from_json(value.get("input"))
    if not isinstance(inputs, dict) or says_nothing(inputs.get("messages")):
        raise BadRow(f"input is {describe_value(inputs)}, not an object with messages")
    answers = [_turns(value.get(name), name, "assistant") for name in ("preferred_output", "non_preferred_output")]
    prompt = _turns(inputs["messages"], "input.messages", "user")
    rest = {name: part for name, part in value.items() if name not in ("input", "tools")} | inputs
    read = frozenset(("messages", "preferred_output", "non_preferred_output"))
    return _Written(prompt, (answers[0], answers[1]), rest, read, "preferred_output and non_preferred_output")


def _written_by_ms_swift(value: dict[str, Any]) -> _Written:
    turns = _turns(value.get("messages"), "messages", "user")
    if not turns or not isinstance(turns[-1], dict) or turns[-1].get("role") != "assistant":
        raise BadRow("rejected_response is given, but messages do not end with the chosen answer")
    rejected = _turns(value["rejected_response"], "rejected_response", "assistant")
    read = frozenset(("messages", "rejected_response"))
    return _Written(turns[:-1], (turns[-1:], rejected), value, read, "messages and rejected_response")


def _turns(value: Any, name: str, role: str, row: dict[str, Any] | None = None) -> list[Any]:
    """Return a text, a message or a list of messages as a list; `row` may have more of a text prompt.

    A text is a list of messages that a table stored as JSON only if every entry has a role and what was said: answers
    may be JSON themselves.
    """
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [value]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return value
    if (stored := turns_from_json(value, _is_message)) is not None:
        return stored
    if not isinstance(value, str):
        raise BadRow(f"{name} is {describe_value(value)}, neither text nor messages")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    return [{"role": role, "content": value if row is None else with_input(value, row)}]


def _is_message(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    return ("role" in turn and ("content" in turn or "tool_calls" in turn)) or {"from", "value"} <= turn.keys()


# ---- conversations


def _pair(written: _Written, origin: Origin, unread: list[tuple[Place, str]]) -> Pair:
    given = None if written.prompt is None else read_turns(written.prompt, unread)
    both = [
        _conversation_with(given, turns, name, unread if name == "chosen" else [])
        for name, turns in zip(SIDES, written.answers, strict=True)
    ]
    if _plain(both[0]) == _plain(both[1]):
        raise BadRow("chosen and rejected are the same, so there is nothing to prefer")
    shared = _num_shared(*both)
    conversations = []
    for name, messages in zip(SIDES, both, strict=True):
        _check_answer(messages[shared:], name)
        marked = [*map(as_given, messages[:shared]), *messages[shared:]]
        own = unread if name == "chosen" else []
        conversations.append(as_conversation(marked, written.value, origin, own, read=written.read))
    return Pair(chosen=conversations[0], rejected=conversations[1], origin=origin)


def _conversation_with(
    given: list[Message] | None, turns: list[Any], name: str, unread: list[tuple[Place, str]]
) -> list[Message]:
    """Return a whole conversation, with the notes `given` and `started` of its prompt."""
    try:
        messages = read_turns(turns, unread, first=1 if given is None else len(given) + 1)
    except BadRow as bad:
        raise BadRow(f"{name}: {bad}") from None
    if not messages:
        raise BadRow(f"{name} is empty")
    if given is None and messages[0]["role"] == "assistant":
        raise BadRow(
            f"{name} is an answer without a prompt: give prompt, or write both answers as whole lists of messages"
        )
    if given is None:
        return messages
    if messages[0]["role"] == "assistant":
        return continued(given, messages)
    system = [message for message in given[:1] if message["role"] == "system"]
    if messages[0]["role"] != "system":
        messages = [*system, *messages]
    own = [message for message in messages if message["role"] != "system"]
    asked = [message for message in given if message["role"] != "system"]
    if [_said(message) for message in own[: len(asked)]] != [_said(message) for message in asked]:
        raise BadRow(f"{name} is a whole conversation, but does not begin with the messages of the row's prompt")
    return messages


def _said(message: Message) -> tuple[str, str]:
    return message["role"], str(message.get("content") or "").strip()


def _plain(messages: Sequence[Message]) -> list[Message]:
    return [{key: part for key, part in message.items() if key not in _NOTES} for message in messages]


def _num_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return how many messages the two conversations begin with alike.

    Raises:
        BadRow: Where they part, one does not go on with an answer.
    """
    one, other = _plain(chosen), _plain(rejected)
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for name, messages in zip(SIDES, (one, other), strict=True):
        if shared == len(messages):
            raise BadRow(f"{name} has no answer of its own: the other one is the same conversation, continued")
        if messages[shared]["role"] != "assistant":
            raise BadRow(
                f"the prompts of chosen and rejected differ: message {shared + 1} of {name} "
                f"({messages[shared]['role']}) is {describe_value(messages[shared].get('content', ''))}"
            )
    return shared


def _check_answer(messages: Sequence[Message], name: str) -> None:
    """Refuse an answer that says nothing."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(has_text(message) or message.get("tool_calls") for message in answers):
        raise BadRow(f"{name} is empty")
