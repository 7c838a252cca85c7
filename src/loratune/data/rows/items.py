"""Messages in the forms of other APIs → messages with role and content, as OpenAI's chat API has them.

The Responses API has items: thoughts, calls and results stand beside messages. Anthropic's has tool results inside the
user's message. Whatever is neither stays as it is.
"""

from __future__ import annotations

from typing import Any

from loratune.data.rows.fields import describe_value, says_nothing
from loratune.run.errors import BadRow

_ITEMS = ("message", "reasoning", "function_call", "function_call_output")


def chat_messages(turns: list[Any]) -> list[Any]:
    """Return messages with roles; a list that has them already is returned itself.

    Raises:
        BadRow: An item cannot be written as a message.
    """
    if any(isinstance(turn, dict) and turn.get("type") in _ITEMS for turn in turns):
        turns = _from_items(turns)
    if any(isinstance(turn, dict) and _has_results(turn.get("content")) for turn in turns):
        turns = [message for turn in turns for message in _without_results(turn)]
    return turns


# ---- Responses API


def _from_items(items: list[Any]) -> list[Any]:
    """Join the items of an answer, which are thoughts, then text, then calls, into one message."""
    turns: list[Any] = []
    answer: dict[str, Any] | None = None
    for number, item in enumerate(items, start=1):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "function_call_output":
            answer = None
            turns.append(_result(item))
            continue
        part = _part_of_answer(item, number)
        if part is None:
            answer = None
            turns.append(_without(item, "type") if kind == "message" else item)
        elif answer is None or not _may_follow(answer, part):
            answer = {"role": "assistant", "content": None, **part}
            turns.append(answer)
        else:
            calls = [*answer.get("tool_calls", ()), *part.get("tool_calls", ())]
            answer.update({**part, **({"tool_calls": calls} if calls else {})})
    return turns


def _part_of_answer(item: Any, number: int) -> dict[str, Any] | None:
    """Return what an item adds to an answer; None if it is no part of one."""
    if not isinstance(item, dict):
        return None
    kind = item.get("type")
    if kind == "function_call":
        return {"tool_calls": [item]}
    if kind == "reasoning":
        return _reasoning(item, number)
    if "role" in item:
        return _without(item, "type") if item["role"] == "assistant" else None
    raise BadRow(f"message {number} is an item of type {describe_value(kind)}, which is not a message, call or result")


def _may_follow(answer: dict[str, Any], part: dict[str, Any]) -> bool:
    if "tool_calls" in part:
        return True
    if "reasoning_content" in part:
        return False
    return answer.get("content") is None and not answer.get("tool_calls")


def _result(item: dict[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "content": item.get("output"), **_without(item, "type", "output")}


def _reasoning(item: dict[str, Any], number: int) -> dict[str, Any]:
    key = next((key for key in ("content", "summary", "text") if not says_nothing(item.get(key))), "")
    parts = item.get(key)
    if isinstance(parts, str):
        return {**_without(item, "type", key), "reasoning_content": parts}
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRow(f"message {number} has reasoning without readable text: {describe_value(item)}")
    return {**_without(item, "type", key), "reasoning_content": "\n".join(map(str, texts))}


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}


# ---- Anthropic


def _has_results(content: Any) -> bool:
    return isinstance(content, list) and any(isinstance(p, dict) and p.get("type") == "tool_result" for p in content)


def _without_results(turn: Any) -> list[Any]:
    """Make each tool result of a user's message a message of its own, in their order."""
    if not isinstance(turn, dict) or not _has_results(turn.get("content")):
        return [turn]
    turns: list[dict[str, Any]] = []
    rest: list[Any] = []
    others = {key: value for key, value in turn.items() if key not in ("role", "content")}
    for part in turn["content"]:
        if not isinstance(part, dict) or part.get("type") != "tool_result":
            rest.append(part)
            continue
        if rest:
            raise BadRow("a message has a tool result after other parts; make the result a message of its own")
        if part.get("is_error"):
            raise BadRow("a tool result has is_error, which no chat template writes; say so in its content")
        known = ("type", "content", "tool_use_id", "is_error")
        more = {key: value for key, value in part.items() if key not in known}
        identity = {"tool_call_id": part["tool_use_id"]} if not says_nothing(part.get("tool_use_id")) else {}
        turns.append({"role": "tool", "content": part.get("content", ""), **identity, **others, **more})
    return [*turns, {**turn, "content": rest}] if rest else turns
