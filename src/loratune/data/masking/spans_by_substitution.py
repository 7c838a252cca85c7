"""Which characters of a rendered conversation are trained, found in two independent ways.

An answer's span starts where the prompt for it ends (what a server would send to the model at that point) and ends
with its stop token: what a model must produce, and nothing else. The whitespace that a template writes after the stop
token is not part of it.

    <|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎Hi!<|im_end|>⏎
                                                           └─────────┘

The span of another role's message is its text, and what follows it up to the token that ends it, where the template
writes one. It is part of the span only if it stands before everything that belongs to the next message.

    <|im_start|>user⏎Hello<|im_end|>⏎      [INST] <<SYS>>⏎Be brief.⏎<</SYS>>⏎⏎Hello [/INST] Hi!</s>
                     └───────────┘                        └───────┘

1. `SubstitutionMatcher` renders the conversation with sentinels in place of all texts, which shows what the template itself
   writes, and finds the true text to be exactly that with the true texts in the holes.
2. `second_spans`: the template's own marks, prompts, and renderings with another text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from loratune.data.masking.template import ChatTemplate, Tools, header_variants, without_thoughts
from loratune.data.rows.conversation import BadRow, Message, split_thoughts

Span = tuple[int, int]

_SENTINEL = re.compile(r"Qk(\d+)([ct])Z")
_CACHED_SHAPES = 512


class TextSlot(NamedTuple):
    """A place where the template writes a message's text."""

    message: int
    thoughts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """How the prompt for an answer ends: with a message's text, and what the template writes after it."""

    anchor: TextSlot | None
    tail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLayout:
    """A rendered conversation without its texts: gaps[0] hole[0] gaps[1] hole[1] … gaps[n]."""

    gaps: tuple[str, ...]
    holes: tuple[TextSlot, ...]
    prompts: dict[int, Prompt]
    """Of each answer to be trained, or to a message that is, by its message."""
    tails: dict[int, str | None]
    """What the template writes after each trained text that is no answer, where it is the last; None where it is never that."""
    num_controls: int
    """Special tokens that the template writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A conversation as it will be trained."""

    text: str
    spans: list[Span]
    """Of each trained message."""
    without_stop_token: frozenset[int]
    """The numbers of the spans that end without a stop token."""
    num_restored: int
    """Answers whose thoughts the template dropped, and which were put back."""
    num_controls: int
    """Special tokens that the template writes. More tokens of this kind would come from the texts."""


@dataclass(slots=True)
class _Draft:
    """A layout with this conversation's texts, while thoughts are put back into it."""

    layout: TemplateLayout
    gaps: list[str]
    texts: list[str]
    starts: list[int] = field(default_factory=list)

    def join(self) -> str:
        """The text; `starts` becomes where each hole starts in it."""
        pieces: list[str] = []
        position = 0
        self.starts = []
        for gap, text in zip(self.gaps, self.texts, strict=False):
            self.starts.append(position + len(gap))
            position += len(gap) + len(text)
            pieces += (gap, text)
        return "".join([*pieces, self.gaps[-1]])

    def end(self, hole: int) -> int:
        return self.starts[hole] + len(self.texts[hole])


class SubstitutionMatcher:
    """Finds answers by substitution. Layouts are kept, since most conversations of a data set have few shapes."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._header = without_thoughts(template.header)
        self._layouts: dict[object, TemplateLayout] = {}

    def __call__(self, text: str, messages: Sequence[Message], tools: Tools, turns: Sequence[int]) -> Rendering:
        """Find the trained messages in a rendered conversation, after putting back thoughts that the template dropped.

        Args:
            text: The conversation as the template renders it.
            messages: Its messages.
            tools: Its tools.
            turns: The messages to be trained.

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
                start, end = _span(draft, text, turn, messages[turn], self._template.stops)
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
        """The span of a message that is no answer, and whether a stop token ends it."""
        index = draft.layout.holes.index(TextSlot(turn, thoughts=False))
        end, limit = draft.end(index), _limit(draft, text, turn, messages)
        stop = message_end(text, end, limit, draft.layout.tails[turn], tools, self._template)
        return blanks_before(text, draft.starts[index]), end if stop is None else stop, stop is not None

    def _match(self, text: str, messages: Sequence[Message], tools: Tools, turns: Sequence[int]) -> _Draft:
        layout = self._cached_layout(messages, tools, turns)
        texts = _fill(layout, text, messages)
        if texts is None:
            # Some templates look into the messages (Qwen3: does it start with <tool_response>?): keep what may be kept.
            layout = self._layout(messages, tools, turns, trained_only=True)
            texts = _fill(layout, text, messages)
            _check_nothing_dropped(text, messages)
        if texts is None:
            raise BadRow("the chat template changes trained texts in a way that cannot be followed")
        return _Draft(layout=layout, gaps=list(layout.gaps), texts=texts)

    def _cached_layout(self, messages: Sequence[Message], tools: Tools, turns: Sequence[int]) -> TemplateLayout:
        key = (tuple(map(_shape, messages)), json.dumps(tools) if tools else "", tuple(turns))
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _CACHED_SHAPES:
                self._layouts.clear()
            layout = self._layouts[key] = self._layout(messages, tools, turns, trained_only=False)
        return layout

    def _layout(
        self, messages: Sequence[Message], tools: Tools, turns: Sequence[int], *, trained_only: bool
    ) -> TemplateLayout:
        hidden = [
            _hide(message, number) if message["role"] == "assistant" or number in turns or not trained_only else message
            for number, message in enumerate(messages)
        ]
        gaps, holes = _split(self._template.render(hidden, tools))
        for number, message in enumerate(hidden):
            if message is not messages[number] and has_text(message):
                _check_written_once(holes, number, message["role"])
        answers = [turn for turn in turns if messages[turn]["role"] == "assistant"]
        answers += [turn + 1 for turn in turns if turn not in answers and _is_answered(messages, turn)]
        prompts = {turn: self._prompt(hidden[:turn], tools) for turn in answers}
        if any(prompt.anchor is not None and prompt.anchor not in holes for prompt in prompts.values()):
            raise BadRow("the chat template writes a prompt that does not occur in the conversation")
        num_controls = sum(map(self._template.special_text.count, gaps))
        tails = {turn: self._tail(hidden[: turn + 1], tools) for turn in turns if turn not in prompts}
        return TemplateLayout(gaps=gaps, holes=holes, prompts=prompts, tails=tails, num_controls=num_controls)

    def _tail(self, hidden: Sequence[Message], tools: Tools) -> str | None:
        gaps, holes = _split(self._template.probe(hidden, tools))
        return gaps[-1] if holes[-1:] == (TextSlot(len(hidden) - 1, thoughts=False),) else None

    def _prompt(self, hidden: Sequence[Message], tools: Tools) -> Prompt:
        if not hidden:
            raise BadRow("message 1 (assistant) answers nothing: the conversation starts with it")
        gaps, holes = _split(self._template.render(hidden, tools, prompt=True))
        return Prompt(anchor=holes[-1] if holes else None, tail=gaps[-1])


# ---- layouts


def has_text(message: Message) -> bool:
    return bool(message.get("content", "").strip())


def _shape(message: Message) -> object:
    """All of a message that may change what a template writes around its texts."""
    others = {name: value for name, value in message.items() if name not in ("role", "content", "reasoning_content")}
    return message["role"], has_text(message), "reasoning_content" in message, json.dumps(others) if others else ""


def _hide(message: Message, number: int) -> Message:
    """The message with sentinels in place of its texts."""
    hidden = dict(message)
    if has_text(message):
        hidden["content"] = f"Qk{number}cZ"
    if "reasoning_content" in message:
        hidden["reasoning_content"] = f"Qk{number}tZ"
    return hidden


def _split(text: str) -> tuple[tuple[str, ...], tuple[TextSlot, ...]]:
    pieces = _SENTINEL.split(text)  # gap, number, kind, gap, number, kind, gap
    holes = tuple(TextSlot(int(number), kind == "t") for number, kind in zip(pieces[1::3], pieces[2::3], strict=True))
    return tuple(pieces[0::3]), holes


def _check_written_once(holes: Sequence[TextSlot], number: int, role: str) -> None:
    times = holes.count(TextSlot(number, thoughts=False))
    if times != 1:
        does = "drops" if not times else f"repeats {times} times"
        raise BadRow(f"the chat template {does} the text of message {number + 1} ({role})")


def _check_nothing_dropped(text: str, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        content = message.get("content", "").strip()
        if message["role"] != "assistant" and content not in text and _in_json(content) not in text:
            raise BadRow(f"the chat template drops or changes the text of message {number} ({message['role']})")


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _fill(layout: TemplateLayout, text: str, messages: Sequence[Message]) -> list[str] | None:
    """The texts in the holes, if the whole text is the layout with the messages' texts in its holes."""
    if not text.startswith(layout.gaps[0]):
        return None
    position = len(layout.gaps[0])
    texts: list[str] = []
    for number, hole in enumerate(layout.holes):
        gap = layout.gaps[number + 1]
        for candidate in _candidates(messages[hole.message], hole):
            if text.startswith(candidate, position) and text.startswith(gap, position + len(candidate)):
                break
        else:
            return None
        texts.append(candidate)
        position += len(candidate) + len(gap)
    return texts if position == len(text) else None


def _candidates(message: Message, hole: TextSlot) -> Iterator[str]:
    """The forms in which a template may write a text: as it is, trimmed, inside JSON, without its thoughts."""
    text = message["reasoning_content" if hole.thoughts else "content"]
    yield text
    yield from _trimmed(text)
    yield from _trimmed(_in_json(text))
    if message["role"] == "assistant" and not hole.thoughts:
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
    yield _in_json(text.strip())


# ---- answers


def _restore(draft: _Draft, turn: int, message: Message, template: ChatTemplate) -> bool:
    """Put back the thoughts of an answer if the template dropped them."""
    if "reasoning_content" in message:
        if TextSlot(turn, thoughts=True) in draft.layout.holes:
            return False
        _insert_thoughts(draft, turn, message["reasoning_content"].strip(), template)
        return True
    parts = split_thoughts(message.get("content", ""))
    if parts is None:
        return False
    index = draft.layout.holes.index(TextSlot(turn, thoughts=False))
    if "</think>" in draft.texts[index]:
        return False
    draft.texts[index] = join_thoughts(*parts) if template.opens_thoughts else message["content"]
    return True


def join_thoughts(thoughts: str, answer: str) -> str:
    """Thoughts and answer as reasoning models write them."""
    return f"<think>\n{thoughts.strip()}\n</think>\n\n{answer.lstrip()}"


def _insert_thoughts(draft: _Draft, turn: int, thoughts: str, template: ChatTemplate) -> None:
    """Write thoughts as the template writes those of a last answer."""
    form = template.thoughts
    assert form is not None
    prompt = draft.layout.prompts[turn]
    index = _gap_after(draft.layout, prompt)
    start = without_thoughts(prompt.tail)
    if not draft.gaps[index].startswith(start):
        raise BadRow(f"the chat template drops the thoughts of message {turn + 1}, and they cannot be put back")
    rest = draft.gaps[index][len(start) :]
    if draft.layout.holes[index : index + 1] == (TextSlot(turn, thoughts=False),):
        rest = ""  # all between header and answer: the template's form of having no thoughts
    rest = re.sub(r"^<think>\s*</think>\s*", "", rest)
    draft.gaps[index] = f"{start}{form.before}{thoughts}{form.after}{rest}"


def _gap_after(layout: TemplateLayout, prompt: Prompt) -> int:
    return 0 if prompt.anchor is None else layout.holes.index(prompt.anchor) + 1


def _span(draft: _Draft, text: str, turn: int, message: Message, stops: tuple[str, ...]) -> Span:
    """From the end of the prompt, over the texts of this message, to the first stop token after them."""
    holes = draft.layout.holes
    prompt = draft.layout.prompts[turn]
    first = _gap_after(draft.layout, prompt)
    base = 0 if first == 0 else draft.end(first - 1)
    variant = next((v for v in header_variants(prompt.tail) if text.startswith(v, base)), None)
    if variant is None:
        raise BadRow(f"the chat template starts message {turn + 1} (assistant) with something else than its prompt")
    start = base + len(variant)
    after = first
    while after < len(holes) and holes[after].message == turn:
        after += 1
    if has_text(message) and TextSlot(turn, thoughts=False) not in holes[first:after]:
        raise BadRow(f"the chat template writes the text of message {turn + 1} (assistant) outside of its turn")
    body_end = draft.end(after - 1) if after > first else start
    limit = draft.starts[after] if after < len(holes) else len(text)
    end = first_stop(text, max(start, body_end), limit, stops)
    if end is None:
        raise BadRow(
            f"the chat template ends message {turn + 1} (assistant) without a stop token ({' or '.join(stops)}); "
            "training it would teach the model not to stop; data.train_on=last trains the last answer only"
        )
    _check_calls_written(message, text[start:end], turn)
    return start, end


def _limit(draft: _Draft, text: str, turn: int, messages: Sequence[Message]) -> int:
    """Before which a message that is no answer ends: the answer's own part, or the next text."""
    holes, hole = draft.layout.holes, TextSlot(turn, thoughts=False)
    index = holes.index(hole)
    limit = draft.starts[index + 1] if index + 1 < len(holes) else len(text)
    prompt = draft.layout.prompts.get(turn + 1)
    if prompt is not None and prompt.anchor == hole:
        end = draft.end(index)
        variant = next((v for v in header_variants(prompt.tail) if text.startswith(v, end)), None)
        if variant is None:
            raise BadRow(f"the chat template starts message {turn + 2} (assistant) with something else than its prompt")
        return min(limit, end + len(variant))
    following = holes[index + 1].message if index + 1 < len(holes) else len(messages)
    if following != turn + 1 and not all(map(has_text, messages)):
        raise BadRow(
            f"where message {turn + 1} ({messages[turn]['role']}) ends cannot be told: a message without text follows"
        )
    return limit


def _is_answered(messages: Sequence[Message], turn: int) -> bool:
    return turn + 1 < len(messages) and messages[turn + 1]["role"] == "assistant"


def message_end(
    text: str, start: int, limit: int, tail: str | None, tools: Tools, template: ChatTemplate
) -> int | None:
    """Where a message that is no answer ends with a stop token of its own; None where the template writes none, or tools before it.

    Args:
        text: The conversation.
        start: Where the message's text ends.
        limit: Before which the message ends.
        tail: What the template writes after this text where it is the last; None where that is not known.
        tools: Of the conversation.
        template: Of the tokenizer.
    """
    end = first_stop(text, start, limit, template.ends)
    if end is None:
        return None
    between = text[start:end]
    # what starts the next message may be what ends an answer: GLM's <|user|>
    own = template.control_tokens.search(text, end, limit) is not None if tail is None else tail.startswith(between)
    return end if own and not any(tool["function"]["name"] in between for tool in tools or ()) else None


def blanks_before(text: str, start: int) -> int:
    """Where a text starts with the blanks before it, which most tokenizers make one token with its first word."""
    return len(text[:start].rstrip(" "))


def _refuse_header(answer: str, header: str, turn: int) -> None:
    """A template may leave the header out of a prompt (after tool results) but write it all the same."""
    if header and answer.startswith(header):
        raise BadRow(f"the chat template starts message {turn + 1} (assistant) with {header!r}, which its prompt lacks")


def _check_calls_written(message: Message, answer: str, turn: int) -> None:
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in answer:
            raise BadRow(f"the chat template drops the tool call of message {turn + 1} ({call['function']['name']})")


def first_stop(text: str, start: int, limit: int, stops: Sequence[str]) -> int | None:
    """Where the first stop token in text[start:limit] ends."""
    found = [(position, len(stop)) for stop in stops if (position := text.find(stop, start, limit)) >= 0]
    if not found:
        return None
    position, length = min(found)
    return position + length
