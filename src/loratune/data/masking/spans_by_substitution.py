"""The first way of finding which characters of a rendered conversation are trained: sentinel substitution.

An answer's span starts where the prompt for it ends (what a server would send to the model at that point) and ends
with its stop token: exactly what a model must produce. The whitespace that a template writes after the stop token is
not part of it.

    <|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎Hi!<|im_end|>⏎
                                                           └─────────┘

The span of another role's message is its text, and what follows it up to the token that ends it, if the template writes
one. That token is part of the span only if it comes before everything that belongs to the next message.

    <|im_start|>user⏎Hello<|im_end|>⏎      [INST] <<SYS>>⏎Be brief.⏎<</SYS>>⏎⏎Hello [/INST] Hi!</s>
                     └───────────┘                        └───────┘

`SubstitutionMatcher` renders the conversation with sentinels in place of all texts, which shows what the template
itself writes, and checks that the true text is exactly that with the true texts in the slots. `spans_by_prompting` is
the second, independent way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratune.data.masking.spans import Span, blanks_before, first_stop, header_variants, message_end, without_thoughts
from loratune.data.masking.template_layout import (
    LayoutFinder,
    TemplateLayout,
    TextSlot,
    fill,
    in_json,
)
from loratune.data.rows.conversation import Message, has_text, split_thoughts, thoughts_before
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.masking.template import ChatTemplate, Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A conversation as it will be trained."""

    text: str
    spans: list[Span]
    """The span of each trained message."""
    without_stop_token: frozenset[int]
    """Indices of the spans that end without a stop token."""
    restored: tuple[int, ...]
    """Indices of the answers whose thoughts the template dropped and which were put back."""
    num_controls: int
    """Special tokens that the template writes; any further ones would come from the texts."""


@dataclass(slots=True)
class _Draft:
    """A layout with the texts of one conversation, while dropped thoughts are put back into it."""

    layout: TemplateLayout
    gaps: list[str]
    slots: list[TextSlot]
    texts: list[str]
    starts: list[int] = field(default_factory=list)

    def join(self) -> str:
        """Return the text, and set `starts` to where each slot starts in it."""
        pieces: list[str] = []
        position = 0
        self.starts = []
        for gap, text in zip(self.gaps, self.texts, strict=False):
            self.starts.append(position + len(gap))
            position += len(gap) + len(text)
            pieces += (gap, text)
        return "".join([*pieces, self.gaps[-1]])

    def end(self, slot: int) -> int:
        return self.starts[slot] + len(self.texts[slot])


class SubstitutionMatcher:
    """Finds trained messages by substitution.

    Args:
        template: The chat template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._header = without_thoughts(template.header)
        self._layouts = LayoutFinder(template)

    def __call__(self, text: str, messages: Sequence[Message], tools: Tools, turns: Sequence[int]) -> Rendering:
        """Find the trained messages in a rendered conversation, after putting back thoughts that the template dropped.

        Args:
            text: The conversation as the template renders it.
            messages: Its messages.
            tools: Its tools.
            turns: Indices of the trained messages.

        Raises:
            BadRow: The template drops or changes a text, or writes an answer in a form that cannot be trained.
        """
        draft = self._match(text, messages, tools, turns)
        answers = [turn for turn in turns if messages[turn]["role"] == "assistant"]
        restored = tuple(turn for turn in answers if self._restore(draft, turn, messages, tools))
        text = draft.join()
        spans: list[Span] = []
        without_stop_token: set[int] = set()
        for number, turn in enumerate(turns):
            if messages[turn]["role"] == "assistant":
                start, end = _span(draft, text, turn, messages[turn], self._template.stop_tokens)
                _refuse_header(text[start:end], self._header, turn)
            else:
                start, end, has_stop = self._text_span(draft, text, turn, messages, tools)
                without_stop_token |= set() if has_stop else {number}
            spans.append((start, end))
        num_controls = self._template.special_text.count(text) if restored else draft.layout.num_controls
        return Rendering(
            text=text,
            spans=spans,
            without_stop_token=frozenset(without_stop_token),
            restored=restored,
            num_controls=num_controls,
        )

    def _text_span(
        self, draft: _Draft, text: str, turn: int, messages: Sequence[Message], tools: Tools
    ) -> tuple[int, int, bool]:
        """Return the span of a message of another role, and whether a stop token ends it."""
        index = draft.slots.index(TextSlot(turn, thoughts=False))
        end, limit = draft.end(index), _limit(draft, text, turn, messages)
        stop = message_end(text, end, limit, draft.layout.tails[turn], tools, self._template)
        return blanks_before(text, draft.starts[index]), end if stop is None else stop, stop is not None

    def _match(self, text: str, messages: Sequence[Message], tools: Tools, turns: Sequence[int]) -> _Draft:
        layout = self._layouts.cached(messages, tools, turns)
        texts = fill(layout, text, messages)
        if texts is None:
            # Some templates look into the messages (Qwen3: does it start with <tool_response>?): keep the other texts.
            layout = self._layouts.find(messages, tools, turns, trained_only=True)
            texts = fill(layout, text, messages)
            _check_nothing_dropped(text, messages)
        if texts is None:
            raise BadRow("the chat template changes trained texts in a way that cannot be followed")
        return _Draft(layout=layout, gaps=list(layout.gaps), slots=list(layout.slots), texts=texts)

    def _restore(self, draft: _Draft, turn: int, messages: Sequence[Message], tools: Tools) -> bool:
        """Put back the thoughts of an answer if the template dropped them; return whether it did."""
        message = messages[turn]
        if "reasoning_content" in message:
            if TextSlot(turn, thoughts=True) in draft.slots:
                return False
            self._replace_by_last(draft, turn, messages[: turn + 1], tools)
            return True
        parts = split_thoughts(message.get("content", ""))
        if parts is None:
            return False
        index = draft.slots.index(TextSlot(turn, thoughts=False))
        if "</think>" in draft.texts[index]:
            return False
        draft.texts[index] = (
            thoughts_before(message["content"], opened=self._template.opens_thoughts) + draft.texts[index].lstrip()
        )
        return True

    def _replace_by_last(self, draft: _Draft, turn: int, messages: Sequence[Message], tools: Tools) -> None:
        """Replace an answer by what the template writes for it as the last message, which has its thoughts."""
        text = self._template.render(messages, tools)
        layout = self._layouts.cached(messages, tools, (turn,))
        texts = fill(layout, text, messages)
        if texts is None or TextSlot(turn, thoughts=True) not in layout.slots:
            raise BadRow(
                f"the chat template drops the thoughts of message {turn + 1} (assistant), and they cannot be put back; "
                "data.thinking=strip trains without them"
            )
        last = _Draft(layout=layout, gaps=list(layout.gaps), slots=list(layout.slots), texts=texts)
        first, after, end = self._place(draft, turn)
        first_of_last, after_of_last, end_of_last = self._place(last, turn)
        rest = draft.gaps[after][end:]
        draft.gaps[first : after + 1] = last.gaps[first_of_last : after_of_last + 1]
        at = first + after_of_last - first_of_last
        draft.gaps[at] = draft.gaps[at][:end_of_last] + rest
        draft.slots[first:after] = last.slots[first_of_last:after_of_last]
        draft.texts[first:after] = last.texts[first_of_last:after_of_last]

    def _place(self, draft: _Draft, turn: int) -> tuple[int, int, int]:
        """Return the gap in which an answer starts, the one in which it ends, and where in that its stop token ends."""
        prompt = draft.layout.prompts[turn]
        first = _gap_after(draft, prompt.anchor)
        variant = next((v for v in header_variants(prompt.tail) if draft.gaps[first].startswith(v)), None)
        if variant is None:
            raise BadRow(f"the chat template drops the thoughts of message {turn + 1}, and they cannot be put back")
        after = first
        while after < len(draft.slots) and draft.slots[after].message == turn:
            after += 1
        gap = draft.gaps[after]
        end = first_stop(gap, len(variant) if after == first else 0, len(gap), self._template.stop_tokens)
        if end is None:
            raise _without_stop(turn, self._template.stop_tokens)
        return first, after, end


def _check_nothing_dropped(text: str, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        content = message.get("content", "").strip()
        if message["role"] != "assistant" and content not in text and in_json(content) not in text:
            raise BadRow(f"the chat template drops or changes the text of message {number} ({message['role']})")


# ---- answers


def _gap_after(draft: _Draft, anchor: TextSlot | None) -> int:
    return 0 if anchor is None else draft.slots.index(anchor) + 1


def _without_stop(turn: int, stops: Sequence[str]) -> BadRow:
    return BadRow(
        f"the chat template ends message {turn + 1} (assistant) without a stop token ({' or '.join(stops)}); "
        "training it would teach the model not to stop; data.train_on=last trains the last answer only"
    )


def _span(draft: _Draft, text: str, turn: int, message: Message, stops: Sequence[str]) -> Span:
    """Return the span from the end of the prompt over the texts of this message to the first stop token after them."""
    slots = draft.slots
    prompt = draft.layout.prompts[turn]
    first = _gap_after(draft, prompt.anchor)
    base = 0 if first == 0 else draft.end(first - 1)
    variant = next((v for v in header_variants(prompt.tail) if text.startswith(v, base)), None)
    if variant is None:
        raise BadRow(f"the chat template starts message {turn + 1} (assistant) with something other than its prompt")
    start = base + len(variant)
    after = first
    while after < len(slots) and slots[after].message == turn:
        after += 1
    if has_text(message) and TextSlot(turn, thoughts=False) not in slots[first:after]:
        raise BadRow(f"the chat template writes the text of message {turn + 1} (assistant) outside its turn")
    body_end = draft.end(after - 1) if after > first else start
    limit = draft.starts[after] if after < len(slots) else len(text)
    end = first_stop(text, max(start, body_end), limit, stops)
    if end is None:
        raise _without_stop(turn, stops)
    return start, end


def _limit(draft: _Draft, text: str, turn: int, messages: Sequence[Message]) -> int:
    """Return the first character after a message of another role: the start of the answer, or of the next text."""
    slots, slot = draft.slots, TextSlot(turn, thoughts=False)
    index = slots.index(slot)
    limit = draft.starts[index + 1] if index + 1 < len(slots) else len(text)
    prompt = draft.layout.prompts.get(turn + 1)
    if prompt is not None and prompt.anchor == slot:
        end = draft.end(index)
        variant = next((v for v in header_variants(prompt.tail) if text.startswith(v, end)), None)
        if variant is None:
            raise BadRow(
                f"the chat template starts message {turn + 2} (assistant) with something other than its prompt"
            )
        return min(limit, end + len(variant))
    following = slots[index + 1].message if index + 1 < len(slots) else len(messages)
    if following != turn + 1 and not all(map(has_text, messages)):
        raise BadRow(
            f"where message {turn + 1} ({messages[turn]['role']}) ends is ambiguous: a message without text follows"
        )
    return limit


def _refuse_header(answer: str, header: str, turn: int) -> None:
    """Reject a span with a header: a template may leave it out of a prompt (after tool results) but write it."""
    if header and answer.startswith(header):
        raise BadRow(f"the chat template starts message {turn + 1} (assistant) with {header!r}, which its prompt lacks")
