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

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratune.data.masking.spans import Span, blanks_before, first_stop, header_variants, message_end, without_thoughts
from loratune.data.masking.template_layout import (
    LayoutFinder,
    PromptEnd,
    TemplateLayout,
    TextSlot,
    fill,
    in_json,
)
from loratune.data.rows.conversation import Message, has_text, split_thoughts
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
    num_restored: int
    """Answers whose thoughts the template dropped and which were put back."""
    num_controls: int
    """Special tokens that the template writes; any further ones would come from the texts."""


@dataclass(slots=True)
class _Draft:
    """A layout with the texts of one conversation, while dropped thoughts are put back into it."""

    layout: TemplateLayout
    gaps: list[str]
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
        num_restored = sum(_restore(draft, turn, messages[turn], self._template) for turn in answers)
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
        num_controls = self._template.special_text.count(text) if num_restored else draft.layout.num_controls
        return Rendering(
            text=text,
            spans=spans,
            without_stop_token=frozenset(without_stop_token),
            num_restored=num_restored,
            num_controls=num_controls,
        )

    def _text_span(
        self, draft: _Draft, text: str, turn: int, messages: Sequence[Message], tools: Tools
    ) -> tuple[int, int, bool]:
        """Return the span of a message of another role, and whether a stop token ends it."""
        index = draft.layout.slots.index(TextSlot(turn, thoughts=False))
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
        return _Draft(layout=layout, gaps=list(layout.gaps), texts=texts)


def _check_nothing_dropped(text: str, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        content = message.get("content", "").strip()
        if message["role"] != "assistant" and content not in text and in_json(content) not in text:
            raise BadRow(f"the chat template drops or changes the text of message {number} ({message['role']})")


# ---- answers


def _restore(draft: _Draft, turn: int, message: Message, template: ChatTemplate) -> bool:
    """Put back the thoughts of an answer if the template dropped them; return whether it did."""
    if "reasoning_content" in message:
        if TextSlot(turn, thoughts=True) in draft.layout.slots:
            return False
        _insert_thoughts(draft, turn, message["reasoning_content"].strip(), template)
        return True
    parts = split_thoughts(message.get("content", ""))
    if parts is None:
        return False
    index = draft.layout.slots.index(TextSlot(turn, thoughts=False))
    if "</think>" in draft.texts[index]:
        return False
    draft.texts[index] = join_thoughts(*parts) if template.opens_thoughts else message["content"]
    return True


def join_thoughts(thoughts: str, answer: str) -> str:
    """Join thoughts and answer as reasoning models write them."""
    return f"<think>\n{thoughts.strip()}\n</think>\n\n{answer.lstrip()}"


def _insert_thoughts(draft: _Draft, turn: int, thoughts: str, template: ChatTemplate) -> None:
    """Insert thoughts in the form in which the template writes those of a last answer."""
    form = template.thoughts
    assert form is not None
    prompt = draft.layout.prompts[turn]
    index = _gap_after(draft.layout, prompt)
    start = without_thoughts(prompt.tail)
    if not draft.gaps[index].startswith(start):
        raise BadRow(f"the chat template drops the thoughts of message {turn + 1}, and they cannot be put back")
    rest = draft.gaps[index][len(start) :]
    if draft.layout.slots[index : index + 1] == (TextSlot(turn, thoughts=False),):
        rest = ""  # everything between header and answer is the template's form of having no thoughts
    rest = re.sub(r"^<think>\s*</think>\s*", "", rest)
    draft.gaps[index] = f"{start}{form.before}{thoughts}{form.after}{rest}"


def _gap_after(layout: TemplateLayout, prompt: PromptEnd) -> int:
    return 0 if prompt.anchor is None else layout.slots.index(prompt.anchor) + 1


def _span(draft: _Draft, text: str, turn: int, message: Message, stops: Sequence[str]) -> Span:
    """Return the span from the end of the prompt over the texts of this message to the first stop token after them."""
    slots = draft.layout.slots
    prompt = draft.layout.prompts[turn]
    first = _gap_after(draft.layout, prompt)
    base = 0 if first == 0 else draft.end(first - 1)
    variant = next((v for v in header_variants(prompt.tail) if text.startswith(v, base)), None)
    if variant is None:
        raise BadRow(f"the chat template starts message {turn + 1} (assistant) with something other than its prompt")
    start = base + len(variant)
    after = first
    while after < len(slots) and slots[after].message == turn:
        after += 1
    if has_text(message) and TextSlot(turn, thoughts=False) not in slots[first:after]:
        raise BadRow(f"the chat template writes the text of message {turn + 1} (assistant) outside of its turn")
    body_end = draft.end(after - 1) if after > first else start
    limit = draft.starts[after] if after < len(slots) else len(text)
    end = first_stop(text, max(start, body_end), limit, stops)
    if end is None:
        raise BadRow(
            f"the chat template ends message {turn + 1} (assistant) without a stop token ({' or '.join(stops)}); "
            "training it would teach the model not to stop; data.train_on=last trains the last answer only"
        )
    _check_calls_written(message, text[start:end], turn)
    return start, end


def _limit(draft: _Draft, text: str, turn: int, messages: Sequence[Message]) -> int:
    """Return the first character after a message of another role: the start of the answer, or of the next text."""
    slots, slot = draft.layout.slots, TextSlot(turn, thoughts=False)
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


def _check_calls_written(message: Message, answer: str, turn: int) -> None:
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in answer:
            raise BadRow(f"the chat template drops the tool call of message {turn + 1} ({call['function']['name']})")
