"""Checks that the chat template writes every tool call and tool schema of a conversation in full.

Two checks, since each sees what the other cannot. A probe has sentinels in place of names and values: a template that
writes one call of two, or finds a tool's name in what a user said, writes too few of them. And the text itself must
have every name and value of a trained call at least as often as its calls have them: a template may treat values
differently.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from loratune.data.masking.template_layout import hide_texts, in_json, shape_of
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loratune.data.masking.template import ChatTemplate, Tools
    from loratune.data.rows.conversation import Message

_CACHED_PROBES = 2048
_STRUCTURE = frozenset(("type", "function", "name", "parameters", "properties", "required", "items"))
"""Keys of a schema that templates write in forms of their own."""


class WrittenCheck:
    """Checks what a template writes of calls and schemas; most conversations of a dataset have one of a few shapes.

    Args:
        template: The chat template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._found: dict[object, tuple[str, tuple[str, ...]]] = {}

    def __call__(self, messages: Sequence[Message], tools: Tools) -> tuple[str, ...]:
        """Check a conversation.

        Args:
            messages: Its messages.
            tools: Its tools.

        Returns:
            The keys of its tools that the template does not write.

        Raises:
            BadRow: The template drops a call, a part of one, or a tool.
        """
        key = (tuple((shape_of(_bare(m)), _call_shape(m)) for m in messages), json.dumps(tools) if tools else "")
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= _CACHED_PROBES:
                self._found.clear()
            found = self._found[key] = self._probe(messages, tools)
        if found[0]:
            raise BadRow(found[0])
        return found[1]

    def _probe(self, messages: Sequence[Message], tools: Tools) -> tuple[str, tuple[str, ...]]:
        """Return why the conversation cannot be trained on, and the keys of tools that are not written."""
        sentinels = _Sentinels()
        hidden = []
        for number, message in enumerate(messages):
            without_texts = hide_texts(message, number)
            if "tool_calls" in message:
                calls = [sentinels.hide_call(call, number) for call in message["tool_calls"]]
                without_texts = {**without_texts, "tool_calls": calls}
            hidden.append(without_texts)
        named = [{**t, "function": {**t["function"], "name": f"qk{n}uz"}} for n, t in enumerate(tools or ())]
        text = self._template.probe(hidden, named or None)
        if not text:  # a template that knows names and values: the check of the text remains
            return "", ()
        for sentinel, what in sentinels.meaning.items():
            if sentinel not in text:
                return f"the chat template drops {what}", ()
        for tool, schema in zip(tools or (), named, strict=True):
            if schema["function"]["name"] not in text:
                return f"the chat template drops the tools: {tool['function']['name']} is not in its text", ()
        return "", tuple(dict.fromkeys(name for t in tools or () for name in _unwritten(t, text)))


def check_calls(message: Message, answer: str, turn: int) -> None:
    """Check that an answer has every name and value of its calls, as often as they have them.

    Args:
        message: The message.
        answer: What the template writes for it.
        turn: Its index.

    Raises:
        BadRow: It has one too few.
    """
    names = Counter(call["function"]["name"] for call in message["tool_calls"])
    for name, times in names.items():
        if answer.count(name) < times:
            raise BadRow(f"the chat template drops the tool call of message {turn + 1} ({name})")
    for leaf, times in Counter(_leaves([call["function"]["arguments"] for call in message["tool_calls"]])).items():
        if max(answer.count(form) for form in _forms(leaf)) < times:
            raise BadRow(
                f"the chat template drops or changes the argument {leaf[:40]!r} of a tool call of message {turn + 1}"
            )


def _leaves(value: Any) -> Iterator[str]:
    """Yield every text and number of a value, and every name in it."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _forms(text: str) -> set[str]:
    """Return the forms in which templates write a text or a number: as it is, in JSON, in JSON as text, in Python."""
    forms = {text, text.strip(), in_json(text), in_json(in_json(text)), json.dumps(text)[1:-1], repr(text)[1:-1]}
    return {form for form in forms if form} or {""}


# ---- probes


class _Sentinels:
    """Makes names and values that occur nowhere else, and remembers what each stands for."""

    def __init__(self) -> None:
        self.meaning: dict[str, str] = {}

    def hide_call(self, call: dict[str, Any], turn: int) -> dict[str, Any]:
        function = call["function"]
        name = f"qk{len(self.meaning)}fz"
        self.meaning[name] = f"the tool call of message {turn + 1} ({function['name']})"
        where = f"of a tool call of message {turn + 1} ({function['name']})"
        return {**call, "function": {**function, "name": name, "arguments": self._hide(function["arguments"], where)}}

    def _hide(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {self._name(f"the argument {name} {where}"): self._hide(part, where) for name, part in value.items()}
        if isinstance(value, list):
            return [self._hide(part, where) for part in value]
        if isinstance(value, bool) or value is None:
            return value
        number = 731_000_000 + len(self.meaning)
        hidden = number if isinstance(value, int) else number + 0.5 if isinstance(value, float) else f"Qk{number}vZ"
        if value != "":
            self.meaning[str(hidden)] = f"an argument {where}"
        return hidden if value != "" else value

    def _name(self, what: str) -> str:
        name = f"qk{len(self.meaning)}kz"
        self.meaning[name] = what
        return name


def _bare(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "tool_calls"}


def _call_shape(message: Message) -> object:
    calls = message.get("tool_calls")
    return None if calls is None else json.dumps([_shape(call["function"]["arguments"]) for call in calls])


def _shape(value: Any) -> object:
    """Return what a value is, without what it says."""
    if isinstance(value, dict):
        return [_shape(part) for part in value.values()]
    if isinstance(value, list):
        return ["list", *map(_shape, value)]
    return value if value in ("", None, True, False) else type(value).__name__


def _unwritten(value: Any, text: str, *, names: bool = False) -> Iterator[str]:
    """Yield the keys of a schema whose value is not in a text; `names`: the keys are names of parameters."""
    if isinstance(value, list):
        for part in value:
            yield from _unwritten(part, text)
    if not isinstance(value, dict):
        return
    for name, part in value.items():
        if names:
            if not _is_written(name, text):
                yield "properties"
        elif name not in _STRUCTURE and not isinstance(part, dict):
            leaves = list(_leaves(part)) or [name]
            if not all(_is_written(line, text) for leaf in leaves for line in leaf.splitlines()):
                yield name
        yield from _unwritten(part, text, names=name == "properties" and not names)


def _is_written(leaf: str, text: str) -> bool:
    return any(form in text for form in _forms(leaf))
