"""What a chat template itself writes around the texts of a conversation, found with sentinels in their place."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from loratune.data.rows.conversation import Message, has_text, split_thoughts
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loratune.data.masking.template import ChatTemplate, Tools

_SENTINEL = re.compile(r"Qk(\d+)([ct])Z")
_CACHED_SHAPES = 512


class TextSlot(NamedTuple):
    """A place where the template writes a message's text, or its thoughts."""

    message: int
    thoughts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEnd:
    """How the prompt for an answer ends: with the text in a slot, and what the template writes after it."""

    anchor: TextSlot | None
    tail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLayout:
    """A rendered conversation without its texts: gaps[0] slots[0] gaps[1] slots[1] … gaps[n]."""

    gaps: tuple[str, ...]
    slots: tuple[TextSlot, ...]
    prompts: dict[int, PromptEnd]
    """The generation prompt before each trained answer (and after each trained message that is answered), by the
    index of the answer."""
    tails: dict[int, str | None]
    """What the template writes after each trained message of another role if it is the last message, by its index; None
    if the template refuses that."""
    num_controls: int
    """Special tokens that the template writes."""


class LayoutFinder:
    """Finds and caches the layouts of conversations: most conversations of a dataset have one of a few shapes.

    Args:
        template: The chat template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._layouts: dict[object, TemplateLayout] = {}

    def cached(self, messages: Sequence[Message], tools: Tools, turns: Sequence[int]) -> TemplateLayout:
        """Return the layout of a conversation, with sentinels in place of all texts."""
        key = (tuple(map(shape_of, messages)), json.dumps(tools) if tools else "", tuple(turns))
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _CACHED_SHAPES:
                self._layouts.clear()
            layout = self._layouts[key] = self.find(messages, tools, turns, trained_only=False)
        return layout

    def find(
        self, messages: Sequence[Message], tools: Tools, turns: Sequence[int], *, trained_only: bool
    ) -> TemplateLayout:
        """Return the layout of a conversation.

        Args:
            messages: The messages of the conversation.
            tools: Its tools.
            turns: Indices of the trained messages.
            trained_only: Whether only answers and trained messages are replaced by sentinels, not all texts.

        Raises:
            BadRow: The template drops or repeats a text, or writes a prompt that does not occur in the conversation.
        """
        hidden = [
            hide_texts(message, number)
            if message["role"] == "assistant" or number in turns or not trained_only
            else message
            for number, message in enumerate(messages)
        ]
        gaps, slots = _split(self._template.render(hidden, tools))
        for number, message in enumerate(hidden):
            if message is not messages[number] and has_text(message):
                _check_written_once(slots, number, message["role"])
        answers = [turn for turn in turns if messages[turn]["role"] == "assistant"]
        answers += [turn + 1 for turn in turns if turn not in answers and _is_answered(messages, turn)]
        prompts = {turn: self._prompt(hidden[:turn], tools) for turn in answers}
        if any(prompt.anchor is not None and prompt.anchor not in slots for prompt in prompts.values()):
            raise BadRow("the chat template writes a prompt that does not occur in the conversation")
        num_controls = sum(map(self._template.special_text.count, gaps))
        tails = {turn: self._tail(hidden[: turn + 1], tools) for turn in turns if turn not in prompts}
        return TemplateLayout(gaps=gaps, slots=slots, prompts=prompts, tails=tails, num_controls=num_controls)

    def _tail(self, hidden: Sequence[Message], tools: Tools) -> str | None:
        gaps, slots = _split(self._template.probe(hidden, tools))
        return gaps[-1] if slots[-1:] == (TextSlot(len(hidden) - 1, thoughts=False),) else None

    def _prompt(self, hidden: Sequence[Message], tools: Tools) -> PromptEnd:
        if not hidden:
            raise BadRow("message 1 (assistant) answers nothing: the conversation starts with it")
        gaps, slots = _split(self._template.render(hidden, tools, prompt=True))
        return PromptEnd(anchor=slots[-1] if slots else None, tail=gaps[-1])


def fill(layout: TemplateLayout, text: str, messages: Sequence[Message]) -> list[str] | None:
    """Return the texts in the slots of a layout.

    Args:
        layout: The layout.
        text: The conversation as the template renders it.
        messages: Its messages.

    Returns:
        None if the text is not exactly the layout with the texts of the messages in its slots.
    """
    if not text.startswith(layout.gaps[0]):
        return None
    position = len(layout.gaps[0])
    texts: list[str] = []
    for number, slot in enumerate(layout.slots):
        gap = layout.gaps[number + 1]
        for candidate in _candidates(messages[slot.message], slot):
            if text.startswith(candidate, position) and text.startswith(gap, position + len(candidate)):
                break
        else:
            return None
        texts.append(candidate)
        position += len(candidate) + len(gap)
    return texts if position == len(text) else None


def in_json(text: str) -> str:
    """Return a text as it is written inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def shape_of(message: Message) -> object:
    """Return everything in a message that may change what a template writes around its texts."""
    others = {name: value for name, value in message.items() if name not in ("role", "content", "reasoning_content")}
    return message["role"], has_text(message), "reasoning_content" in message, json.dumps(others) if others else ""


def hide_texts(message: Message, number: int) -> Message:
    """Replace the texts of a message by sentinels."""
    hidden = dict(message)
    if has_text(message):
        hidden["content"] = f"Qk{number}cZ"
    if "reasoning_content" in message:
        hidden["reasoning_content"] = f"Qk{number}tZ"
    return hidden


def _split(text: str) -> tuple[tuple[str, ...], tuple[TextSlot, ...]]:
    pieces = _SENTINEL.split(text)  # gap, number, kind, gap, number, kind, gap
    slots = tuple(TextSlot(int(number), kind == "t") for number, kind in zip(pieces[1::3], pieces[2::3], strict=True))
    return tuple(pieces[0::3]), slots


def _check_written_once(slots: Sequence[TextSlot], number: int, role: str) -> None:
    times = slots.count(TextSlot(number, thoughts=False))
    if times != 1:
        does = "drops" if not times else f"repeats {times} times"
        raise BadRow(f"the chat template {does} the text of message {number + 1} ({role})")


def _is_answered(messages: Sequence[Message], turn: int) -> bool:
    return turn + 1 < len(messages) and messages[turn + 1]["role"] == "assistant"


def _candidates(message: Message, slot: TextSlot) -> Iterator[str]:
    """Yield the forms in which a template may write a text: as it is, trimmed, inside JSON, without its thoughts."""
    text = message["reasoning_content" if slot.thoughts else "content"]
    yield text
    yield from _trimmed(text)
    yield from _trimmed(in_json(text))
    if message["role"] == "assistant" and not slot.thoughts:
        parts = split_thoughts(text)
        if parts is not None:
            yield parts[1]
            yield from _trimmed(parts[1])


def _trimmed(text: str) -> Iterator[str]:
    yield text.strip()
    yield text.rstrip()
    yield text.lstrip()
    yield text.strip("\n")
    yield text.rstrip("\n")
    yield text.lstrip("\n")
    yield in_json(text.strip())
