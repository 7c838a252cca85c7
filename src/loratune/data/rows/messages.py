"""One message of a row, checked, and in the form that chat templates expect."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from typing import Any

from loratune.data.rows.conversation import ROLES, Message, split_thoughts
from loratune.data.rows.fields import Place, describe_value, says_nothing
from loratune.data.rows.tools import account_for, check_json, check_unicode, from_json, read_calls
from loratune.run.errors import BadRow

_ROLE_ALIASES = {"developer": "system", "function": "tool", "tool_response": "tool"}

# The names in ShareGPT files.
SHAREGPT_ROLES = {
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
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of answers whose whole content is a call."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_TRAINED_FLAGS = ("train", "trainable", "training", "loss", "weight", "loss_mask", "loss_scale")
_FLAGS = frozenset((*_TRAINED_FLAGS, "masked"))
_FORCED = ("train", "trainable", "training", "loss")
"""Flags that, if true on a message of another role than the assistant's, ask for what the recipe may not train."""
_PLAIN = frozenset(("role", "content"))
_READ = {
    role: _PLAIN | _FLAGS | {"name", "tool_call_id", "call_id"} for role in ("system", "user", "tool", "assistant")
}
_READ["assistant"] |= {"tool_calls", "function_call", "reasoning_details", *_REASONING_FIELDS}
_TEXT_PARTS = {
    "text": ("text", "value", "content"),
    "input_text": ("text",),
    "output_text": ("text",),
    "reasoning": ("value", "text", "reasoning"),
    "thinking": ("thinking", "value", "text"),
    "reasoning_text": ("text",),
    "summary_text": ("text",),
}
"""Type of a content part → the keys that may hold its text."""
_THOUGHT_PARTS = ("reasoning", "thinking", "reasoning_text", "summary_text")
_MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file")

Unnamed = list[tuple[Place, str]]


def read_message(turn: Any, number: int, unread: Unnamed | None = None) -> Message:
    """Read a message with role and content.

    Args:
        turn: The message as the row has it.
        number: Its number, from 1, for error messages.
        unread: Receives the fields that are not read.

    Raises:
        BadRow: It cannot be trained on.
    """
    if not isinstance(turn, dict):
        raise BadRow(f"message {number} is {describe_value(turn)}, not an object with role and content")
    if "role" not in turn:
        raise BadRow(f"message {number} has no role; it has {describe_value(turn)}")
    role, content = turn["role"], turn.get("content")
    if (
        turn.keys() == _PLAIN
        and isinstance(content, str)
        and role in ROLES
        and (role != "assistant" or content.strip())
    ):
        check_unicode(content, f"message {number} ({role})")  # most messages of most data: nothing else to read
        return {"role": role, "content": content}
    unread = [] if unread is None else unread
    if turn["role"] in _CALL_ROLES:
        return _read_call_turn(turn, "content", number, unread)
    return _checked(_role(turn["role"], number), turn, number, unread)


def read_sharegpt_message(turn: Any, number: int, unread: Unnamed | None = None) -> Message:
    """Read a message with from and value; arguments and errors as `read_message`."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow(f"message {number} has no from and value; it is {describe_value(turn)}")
    name = str(turn["from"]).lower()
    role = SHAREGPT_ROLES.get(name)
    if role is None:
        raise BadRow(f"message {number} is from {turn['from']!r}, which is not one of {', '.join(SHAREGPT_ROLES)}")
    unread = [] if unread is None else unread
    if name in _CALL_ROLES:
        return _read_call_turn(turn, "value", number, unread)
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    for key in _PLAIN & others.keys():
        if not says_nothing(others[key]):
            raise BadRow(f"message {number} has {key} in addition to from and value")
    return _checked(role, {**others, "content": turn["value"]}, number, unread)


def _read_call_turn(turn: dict[str, Any], key: str, number: int, unread: Unnamed) -> Message:
    """Read a turn whose whole text is a call, or a list of calls, after its thoughts."""
    where = f"message {number} (assistant)"
    value, others = turn[key], {name: part for name, part in turn.items() if name not in ("from", "role", key)}
    if isinstance(value, str) and (parts := split_thoughts(value)) is not None:
        others, value = {"reasoning_content": parts[0].strip(), **others}, parts[1]
    calls = from_json(value.strip() if isinstance(value, str) else value)
    if not isinstance(calls, dict | list) or not calls:
        raise BadRow(f"{where} is a call, but its text is not a JSON object: {describe_value(value)}")
    if not says_nothing(others.get("tool_calls")):
        raise BadRow(f"{where} is a call that has tool_calls too")
    others["tool_calls"] = calls if isinstance(calls, list) else [calls]
    return _checked("assistant", others, number, unread)


def _role(role: Any, number: int) -> str:
    role = _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role in ROLES:
        return role
    near = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"roles are {', '.join(ROLES)}"
    raise BadRow(f"message {number} has the unknown role {role!r}; {hint}")


def _checked(role: str, turn: dict[str, Any], number: int, unread: Unnamed) -> Message:
    where = f"message {number} ({role})"
    account_for("message key", turn, _READ[role], unread, where)
    message: Message = {"role": role}
    said = _content(turn.get("content"), role, where, unread)
    calls = [*read_calls(_calls_of(turn, where), where, unread), *said.calls] if role == "assistant" else []
    if said.text is None and not calls:
        missing = "" if role != "assistant" else " and no tool calls"
        raise BadRow(f"{where} has content null{missing}")
    if said.text is not None and (said.text or not calls):
        message["content"] = check_unicode(said.text, where)
    if calls:
        message["tool_calls"] = calls
    thoughts = _thoughts(turn, said.thoughts, where) if role == "assistant" else None
    if thoughts is not None:
        message["reasoning_content"] = check_unicode(thoughts, where)
    if role == "assistant" and not calls and not message["content"].strip():
        raise BadRow(f"{where} is empty: nothing to train")
    message.update(_names(turn, where))
    if not _FLAGS.isdisjoint(turn):
        trained = _is_trained(turn, where)
        if not trained or (role != "assistant" and any(turn.get(name) for name in _FORCED)):
            message["train"] = trained  # `formats` removes it again: templates do not know this field
    return message


def _names(turn: dict[str, Any], where: str) -> dict[str, str]:
    names = {}
    for key in ("name", "call_id", "tool_call_id"):
        value = turn.get(key)
        if says_nothing(value):
            continue
        if not isinstance(value, str):
            raise BadRow(f"{where} has {key} {describe_value(value)}, not text")
        names["tool_call_id" if key == "call_id" else key] = check_unicode(value, where)
    return names


def _is_trained(turn: dict[str, Any], where: str) -> bool:
    """Return the message's own flag: `train`, OpenAI's `weight`, which is 0 or 1, or what means the same."""
    flags = {name: turn[name] for name in _FLAGS if turn.get(name) is not None}
    for name, value in flags.items():
        if value not in (True, False):
            raise BadRow(f"{where} has {name} {describe_value(value)}; it must be true or false")
    return all(bool(value) is (name != "masked") for name, value in flags.items())


def _calls_of(turn: dict[str, Any], where: str) -> Any:
    legacy = from_json(turn.get("function_call"))
    if says_nothing(legacy):
        return turn.get("tool_calls")
    if not says_nothing(from_json(turn.get("tool_calls"))):
        raise BadRow(f"{where} has both tool_calls and function_call")
    return [legacy]


def _thoughts(turn: dict[str, Any], parts: list[str], where: str) -> str | None:
    """Return the thoughts of an answer, which several fields may repeat."""
    found = ["\n".join(parts)] if parts else []
    for name in _REASONING_FIELDS:
        thoughts = turn.get(name)
        if says_nothing(thoughts):
            continue
        if not isinstance(thoughts, str):
            raise BadRow(f"{where} has thoughts that are {describe_value(thoughts)}, not text")
        found.append(thoughts)
    if not says_nothing(turn.get("reasoning_details")):
        found.append(_detailed_thoughts(turn["reasoning_details"], where))
    if any(other.strip() != found[0].strip() for other in found[1:]):
        raise BadRow(f"{where} has different thoughts in two fields: {found[0][:40]!r} and {found[1][:40]!r}")
    return found[0] if found else None


def _detailed_thoughts(details: Any, where: str) -> str:
    details = from_json(details)
    parts = details if isinstance(details, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts or len(texts) != len(parts) or not all(texts):
        raise BadRow(f"{where} has reasoning_details without readable text: {describe_value(details)}")
    return "\n".join(map(str, texts))


# ---- content


@dataclass(slots=True)
class _Said:
    """What the content of a message says."""

    text: str | None
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)


def _content(content: Any, role: str, where: str, unread: Unnamed) -> _Said:
    if isinstance(content, str) or content is None:
        return _Said(text=content)
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        kinds = [part["type"] for part in content]
        if role != "tool" or all(kind in (*_TEXT_PARTS,) for kind in kinds) or any(kind in _MEDIA for kind in kinds):
            return _parts(content, role, where, unread)
    if role == "tool":
        check_json(content, where)  # results are often recorded as the objects they were
        return _Said(text=json.dumps(content, ensure_ascii=False))
    raise BadRow(f"{where} has content {describe_value(content)}, not text")


def _parts(parts: list[dict[str, Any]], role: str, where: str, unread: Unnamed) -> _Said:
    """Join content parts. A template writes thoughts, then text, then calls, so they must stand in this order."""
    said = _Said(text=None)
    texts: list[str] = []
    for part in parts:
        kind = part["type"]
        if kind == "tool_use" and role == "assistant":
            said.calls += read_calls([part], where, unread)
            continue
        keys = _TEXT_PARTS.get(kind, ()) if isinstance(kind, str) else ()
        found = [key for key in keys if isinstance(part.get(key), str)]
        if not found or (kind in _THOUGHT_PARTS and role != "assistant"):
            raise BadRow(f"{where} has a part of type {kind!r}; only text can be trained")
        account_for("part key", part, frozenset(("type", found[0])), unread, f"a part of {where}")
        text = part[found[0]]
        if said.calls and text.strip():
            raise BadRow(f"{where} has text after a tool call; make it a message of its own")
        if kind in _THOUGHT_PARTS:
            if "".join(texts).strip():
                raise BadRow(f"{where} has thoughts after its text; make the rest a message of its own")
            said.thoughts.append(text)
        else:
            texts.append(text)
    said.text = "".join(texts) if texts else None
    return said
