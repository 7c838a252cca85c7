"""The second way of finding which characters are trained; it must agree with the first, `spans_by_substitution`.

For answers, `spans_by_markers` takes what the template marks with `{% generation %}`. Without markers,
`spans_by_prompting` renders the prompt of each answer from the true messages, and reads on to the first stop token, as
generation would.

For other messages, `spans_by_difference` renders the conversation with another text in place of one message's. The
prefix and the suffix that both renderings share are not that text:

    <|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎Hi!<|im_end|>⏎
    <|im_start|>user⏎Qz<|im_end|>⏎<|im_start|>assistant⏎Hi!<|im_end|>⏎
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from typing import TYPE_CHECKING

from loratune.data.masking.spans import Span, blanks_before, first_stop, header_variants, message_end, without_thoughts
from loratune.data.rows.conversation import Message, has_text, split_thoughts, thoughts_before
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loratune.data.masking.template import ChatTemplate, Tools

_ENDING, _COMPARED = 8, 4096  # last characters of a prompt: to search for, and to compare
_OTHER_TEXTS = ("Qz", "Xw", "Kv", "Zg")
"""One of these replaces a text: the one that starts and ends with other letters, also inside JSON."""


def spans_by_prompting(
    text: str, messages: Sequence[Message], tools: Tools, turns: Sequence[int], template: ChatTemplate
) -> list[Span]:
    """Find answers by rendering the prompt of each and reading on to the first stop token.

    Raises:
        BadRow: A prompt does not occur in the conversation.
    """
    prompts = _Prompts(text, messages, tools, template)
    starts = [prompts.end(turn) for turn in turns]
    return [(start, first_stop(text, start, len(text), template.stop_tokens) or len(text)) for start in starts]


def put_thoughts_back(
    text: str,
    spans: Mapping[int, Span],
    restored: Sequence[int],
    messages: Sequence[Message],
    tools: Tools,
    template: ChatTemplate,
) -> tuple[str, dict[int, Span]]:
    """Put the thoughts that the template drops back into its own text, by rendering each answer as the last message.

    Args:
        text: The conversation as the template renders it.
        spans: Index of each message to find → its span in the text.
        restored: Indices of the answers whose thoughts are missing, which are among those to find.
        messages: Its messages.
        tools: Its tools.
        template: The chat template.

    Returns:
        The text with all thoughts, and the spans in it.
    """
    prompts = _Prompts(text, messages, tools, template)
    moved = dict(spans)
    for turn in sorted(restored, key=lambda turn: spans[turn], reverse=True):  # from the end, so that places hold
        start, stop = prompts.bare_end(turn), spans[turn][1]
        new, inside = _with_thoughts(text[start:stop], messages[: turn + 1], tools, template)
        text = text[:start] + new + text[stop:]
        more = len(new) - (stop - start)
        for other, (first, last) in moved.items():
            if first >= stop:
                moved[other] = first + more, last + more
        moved[turn] = start + inside, start + len(new)
    return text, moved


def _with_thoughts(answer: str, messages: Sequence[Message], tools: Tools, template: ChatTemplate) -> tuple[str, int]:
    """Return the last message with its thoughts, and how much of it belongs to the prompt (an open `<think>`)."""
    turn, message = len(messages) - 1, messages[-1]
    if "reasoning_content" in message:
        last = template.render(messages, tools)
        prompts = _Prompts(last, messages, tools, template)
        stop = first_stop(last, prompts.end(turn), len(last), template.stop_tokens) or len(last)
        new = last[prompts.bare_end(turn) : stop]
    else:
        body = (split_thoughts(message["content"]) or ("", ""))[1].strip()
        new = thoughts_before(message["content"], opened=template.opens_thoughts) + answer[max(0, answer.find(body)) :]
    prompt = template.render(messages[:-1], tools, prompt=True)
    opened = prompt[len(without_thoughts(prompt)) :]
    return new, next(len(variant) for variant in (opened, opened.rstrip(), "") if new.startswith(variant))


class _Prompts:
    """The ends of the prompts of answers in a rendered conversation."""

    def __init__(self, text: str, messages: Sequence[Message], tools: Tools, template: ChatTemplate) -> None:
        self._text = text
        self._messages = messages
        self._tools = tools
        self._template = template
        self._ends: dict[int, int] = {}

    def end(self, turn: int) -> int:
        if turn not in self._ends:
            prompt = self._template.render(self._messages[:turn], self._tools, prompt=True)
            variants = header_variants(prompt) if not self._text.startswith(prompt) else [prompt]
            fitting = next((variant for variant in variants if self._text.startswith(variant)), None)
            self._ends[turn] = self._search(turn, prompt, variants) if fitting is None else len(fitting)
        return self._ends[turn]

    def bare_end(self, turn: int) -> int:
        """Return the end without the `<think>` that a prompt may open."""
        return len(without_thoughts(self._text[: self.end(turn)]))

    def _search(self, turn: int, prompt: str, variants: Sequence[str]) -> int:
        """Find the end of a prompt in which the template writes earlier messages in another way."""
        # Search for the last message and everything after it, from the start of the previous answer on. Some templates
        # (Mistral's) even move texts between messages: then take the place whose preceding text resembles it most.
        answers = [n for n in range(1, turn) if self._messages[n]["role"] == "assistant"]
        floor = self.end(answers[-1]) if answers else 0
        before = self._template.probe(self._messages[: turn - 1], self._tools)
        last = len(os.path.commonprefix([prompt, before]))  # noqa: RUF071 - of characters
        endings = [variant[last:] for variant in variants if before]
        found = [(place, -len(ending)) for ending in endings if (place := self._text.find(ending, floor)) >= 0]
        if found:
            place, length = min(found)  # the first, and there the longest
            return place - length
        places = [place for variant in variants for place in _places_like(self._text, variant, floor)]
        if not places:
            raise BadRow("the chat template writes a prompt that does not occur in the conversation")
        return -max(places)[1]


def _places_like(text: str, prompt: str, floor: int) -> Iterator[tuple[int, int]]:
    """Yield, for each place that reads like the end of the prompt, the length of the match and its end (negated)."""
    for match in re.finditer(re.escape(prompt[-_ENDING:]), text[floor:]):
        end = floor + match.end()
        yield _common_suffix(text[max(0, end - _COMPARED) : end], prompt), -end


def spans_by_markers(text: str, marked: Sequence[Span], template: ChatTemplate) -> list[Span]:
    """Convert what a template marks to our definition of an answer.

    Markers differ: some include the header (`<|start|>assistant`), some the blanks after the stop token, some the
    end-of-sequence token after it. What they say about the content is kept, right or wrong.

    Raises:
        BadRow: The markers leave out the stop token.
    """
    spans: list[Span] = []
    for start, end in _merged(marked):
        begin = _after_header(text, start, template.header)
        while begin < end and text[begin:end].strip() not in ("", *template.stop_tokens):
            stop = first_stop(text, begin, end, template.stop_tokens)
            if stop is None:
                rest = text[end:].lstrip()
                if rest.startswith(template.stop_tokens):
                    raise BadRow("the chat template marks an answer without its stop token as generated")
                stop = end
            spans.append((begin, stop))
            begin = stop
    return spans


def spans_by_difference(
    text: str, messages: Sequence[Message], tools: Tools, turns: Sequence[int], template: ChatTemplate
) -> list[Span]:
    """Find messages of other roles by rendering the conversation with another text in place of each.

    Args:
        text: The conversation as the template renders it.
        messages: Its messages.
        tools: Its tools.
        turns: Indices of the messages to find.
        template: The chat template.

    Raises:
        BadRow: A prompt does not occur in the conversation.
    """
    places = _Places(text, messages, tools, template)
    prompts = _Prompts(text, messages, tools, template)
    spans: list[Span] = []
    for turn in turns:
        start, end = places[turn]
        limit = _limit(turn, messages, places, prompts)
        stop = message_end(text, end, limit, _tail(messages[: turn + 1], tools, template), tools, template)
        spans.append((blanks_before(text, start), end if stop is None else stop))
    return spans


def _limit(turn: int, messages: Sequence[Message], places: _Places, prompts: _Prompts) -> int:
    """Return the first character after a message: the end of its answer's prompt, or the start of the next text."""
    _, end = places[turn]
    following = turn + 1
    if following == len(messages):
        limit = len(places.text)
    elif messages[following]["role"] == "assistant":
        limit = prompts.end(following)
    else:
        limit = places[following][0] if has_text(messages[following]) else -1
    if limit >= end:
        return limit
    others = [places[n][0] for n, message in enumerate(messages) if has_text(message)]  # in another order
    return min((start for start in others if start >= end), default=len(places.text))


def _tail(messages: Sequence[Message], tools: Tools, template: ChatTemplate) -> str | None:
    """Return what the template writes after the last text; None if it refuses that or drops the text."""
    text = template.probe(messages, tools)
    if not text:
        return None
    start, end = _Places(text, messages, tools, template)[len(messages) - 1]
    return text[end:] if end > start else None


class _Places:
    """The spans of the texts of messages in a rendered conversation."""

    def __init__(self, text: str, messages: Sequence[Message], tools: Tools, template: ChatTemplate) -> None:
        self.text = text
        self._messages = messages
        self._tools = tools
        self._template = template
        self._found: dict[int, Span] = {}

    def __getitem__(self, number: int) -> Span:
        if number not in self._found:
            content = self._messages[number]["content"]
            bare = content.strip()
            other = next(t for t in _OTHER_TEXTS if t[0] != bare[0] and t[1] != bare[-1])
            changed = [{**m, "content": other} if n == number else m for n, m in enumerate(self._messages)]
            text, with_other = self.text, self._template.render(changed, self._tools)
            start = _num_common(text, with_other)
            self._found[number] = start, max(start, len(text) - _num_common(text[::-1], with_other[::-1]))
        return self._found[number]


def _num_common(one: str, other: str) -> int:
    """Count the characters that both texts start with."""
    most = min(len(one), len(other))
    return bisect_left(range(most), True, key=lambda n: one[: n + 1] != other[: n + 1])


def _common_suffix(one: str, other: str) -> int:
    ends = [text[-_COMPARED:][::-1] for text in (one, other)]
    return len(os.path.commonprefix(ends))  # noqa: RUF071 - of characters


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _after_header(text: str, start: int, header: str) -> int:
    """Return the end of the header that a marked span starts in or right after; else the start of the span."""
    for variant in header_variants(header):
        if variant:
            found = text.rfind(variant, max(0, start - len(variant)), start + len(variant))
            if found >= 0:
                return max(start, found + len(variant))
    return start
