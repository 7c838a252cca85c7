"""Conversations → examples under one policy: rendered, tokenized, masked, and the mask verified."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from loratune.data.examples import Example
from loratune.data.masking.encoder import Encoder
from loratune.data.masking.notices import UNWRITTEN, template_notices
from loratune.data.masking.policy import (
    Policy,
    check_tool_support,
    check_train_flags,
    has_thoughts,
    trained_turns,
    with_thinking,
)
from loratune.data.masking.spans import without_thoughts
from loratune.data.masking.spans_by_prompting import (
    put_thoughts_back,
    spans_by_difference,
    spans_by_markers,
    spans_by_prompting,
)
from loratune.data.masking.spans_by_substitution import Rendering, SubstitutionMatcher
from loratune.data.masking.special_tokens import SpecialText, special_names, special_token_in
from loratune.data.masking.template import ChatTemplate, Tools
from loratune.data.masking.token_labels import LengthViolations, RenderedText, TokenMask, TokenMasker
from loratune.data.masking.tokenizer import backend_of
from loratune.data.masking.written import WrittenCheck, check_calls
from loratune.recipe.roles import trained_roles
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.masking.spans import Span
    from loratune.data.masking.tokens import Tokens
    from loratune.data.rows.conversation import Conversation, Message

P = ParamSpec("P")
R = TypeVar("R")

_NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>")
"""What some templates write at the start of an answer that has no thoughts."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """The results of some conversations: examples laid end to end, so that they are cheap to send and to keep."""

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]
    kept: npt.NDArray[np.int32]
    """Index of each example's conversation."""
    rejected: list[tuple[int, str]]
    """Index of each conversation that cannot be trained on, and why."""
    counts: Counter[str]
    too_long: LengthViolations

    def examples(self, conversations: Sequence[Conversation]) -> Iterator[Example]:
        """Yield the examples, as views of the arrays."""
        stops = np.cumsum(self.lengths)
        for number, length, stop in zip(self.kept.tolist(), self.lengths.tolist(), stops.tolist(), strict=True):
            place = slice(stop - length, stop)
            origin = conversations[number].origin
            yield Example(input_ids=self.input_ids[place], supervised=self.supervised[place], origin=origin)


class Renderer:
    """Turns conversations into examples under one policy.

    Args:
        tokenizer: A fast tokenizer, with a chat template unless all conversations are plain text.
        policy: What to train.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> None:
        self._tokenizer = tokenizer
        self._train_on = policy.train_on
        self._thinking = policy.thinking
        self._encode = Encoder(backend_of(tokenizer))
        self._label = TokenMasker(tokenizer, max_length=policy.max_length, on_long=policy.on_long)
        self._as_text = policy.special_tokens_in_text == "as_text"
        self._counts: Counter[str] = Counter()

    def __call__(self, conversations: Sequence[Conversation]) -> Chunk:
        """Render, tokenize and mask conversations, in their order.

        Raises:
            DataError: See `render`.
        """
        self._counts = self._label.counts = Counter()
        too_long = self._label.too_long = LengthViolations()
        texts = [_result_or_reason(self._render, conversation) for conversation in conversations]
        encoded = iter(self._encode([t.text for t in texts if isinstance(t, RenderedText) and t.hidden is None]))
        results = [
            text if isinstance(text, str)
            # a text with hidden names of special tokens is tokenized by `SpecialText`
            else _result_or_reason(self._labeled, text, next(encoded) if text.hidden is None else None)
            for text in texts
        ]  # fmt: skip
        kept = [(number, part) for number, parts in enumerate(results) if isinstance(parts, list) for part in parts]
        return Chunk(
            input_ids=np.concatenate([np.empty(0, np.int32), *(ids for _, (ids, _) in kept)]),
            supervised=np.concatenate([np.empty(0, np.bool_), *(supervised for _, (_, supervised) in kept)]),
            lengths=np.array([len(ids) for _, (ids, _) in kept], dtype=np.int32),
            kept=np.array([number for number, _ in kept], dtype=np.int32),
            rejected=[(number, result) for number, result in enumerate(results) if isinstance(result, str)],
            counts=self._counts,
            too_long=too_long,
        )

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template. Probed when first needed: plain text needs none."""
        return ChatTemplate(self._tokenizer)

    @cached_property
    def _matcher(self) -> SubstitutionMatcher:
        return SubstitutionMatcher(self.template)

    @cached_property
    def _check_written(self) -> WrittenCheck:
        return WrittenCheck(self.template)

    @cached_property
    def _text_specials(self) -> SpecialText:
        return SpecialText(self._tokenizer, special_names(self._tokenizer))

    @property
    def method(self) -> str:
        """How trained tokens are found and verified."""
        if self._train_on == "all":
            return "every token is trained"
        roles = trained_roles(self._train_on)
        ways = []
        if "assistant" in roles:
            ways.append("the template's generation markers" if self.template.has_markers else "rendered prompts")
        if set(roles) - {"assistant"}:
            ways.append("renderings with another text in a message's place")
        return f"sentinel substitution, checked against {' and '.join(ways)}"

    def notices(self, counts: Counter[str]) -> list[str]:
        """Return what the user should know about the chat template and this data."""
        return template_notices(counts, self.template, self._train_on)

    # ---- texts

    def _render(self, conversation: Conversation) -> RenderedText:
        if conversation.text is not None:
            return self._render_plain(conversation, conversation.text)
        found = special_token_in(conversation, self.template.special_text)
        if found:
            self._counts["special_tokens_in_text"] += 1
            if not self._as_text:
                raise BadRow(found)
            messages, tools = self.template.special_text.hide((conversation.messages, conversation.tools))
            conversation = replace(conversation, messages=messages, tools=tools)
        text = self._render_chat(conversation)
        return replace(text, text=self.template.special_text.show(text.text), hidden=text.text) if found else text

    def _render_plain(self, conversation: Conversation, text: str) -> RenderedText:
        if self._train_on != "all":
            raise BadRow("plain text has no answers; train_on must be all")
        rendered = RenderedText(
            text=text,
            spans=None,
            check=None,
            names=(),
            without_stop_token=frozenset(),
            is_plain_text=True,
            origin=conversation.origin,
            num_controls=None,
            hidden=None,
        )
        specials = self._text_specials
        if not specials.names.search(text):
            return rendered
        self._counts["special_tokens_in_text"] += 1
        return replace(rendered, hidden=specials.hide(text), num_controls=0) if self._as_text else rendered

    def _render_chat(self, conversation: Conversation) -> RenderedText:
        template, tools = self.template, conversation.tools
        turns = trained_turns(conversation.messages, self._train_on, conversation.excluded)
        messages = [
            with_thinking(m, self._thinking, template, n + 1, trained=n in turns) if m["role"] == "assistant" else m
            for n, m in enumerate(conversation.messages)
        ]
        check_train_flags(conversation, self._train_on)
        if self._thinking == "keep":
            moved = [turn for turn in turns if "reasoning_content" in conversation.messages[turn]]
            self._counts["thoughts_as_tags"] += sum("reasoning_content" not in messages[turn] for turn in moved)
        roles = trained_roles(self._train_on)
        if conversation.excluded:
            flagged = [n for n in conversation.excluded if n not in conversation.given]
            self._counts["answers_not_trained"] += sum(messages[n]["role"] in roles for n in flagged)
            self._counts["answers_in_prompts"] += len(conversation.given)
        if not turns and self._train_on != "all":
            raise BadRow(
                "no assistant turn: nothing to train"
                if roles == ("assistant",)
                else f"no message of {' or '.join(roles)}: nothing to train"
            )
        check_tool_support(messages, tools, template)
        marked: list[Span] = []
        if template.has_markers and self._train_on != "all":
            text, marked = template.render_marked(messages, tools)
        else:
            text = template.render(messages, tools)
        if tools or any("tool_calls" in message for message in messages):
            for key in self._check_written(messages, tools):
                self._counts[f"{UNWRITTEN}{key}"] += 1
        rendering = self._matcher(text, messages, tools, turns)
        for (start, end), turn in zip(rendering.spans, turns, strict=True):
            if "tool_calls" in messages[turn]:
                check_calls(messages[turn], rendering.text[start:end], turn)
        self._count(rendering, messages, turns)
        spans: list[Span] | None = None
        check: list[Span] | None = None
        if self._train_on != "all":
            spans = rendering.spans
            second = _second_spans(text, marked, rendering, messages, tools, turns, template)
            if conversation.started is not None:
                begin = conversation.started
                spans, second = (_after_start(rendering.text, found, turns, begin) for found in (spans, second))
            check = None if sorted(second) == sorted(spans) else second
        return RenderedText(
            text=rendering.text,
            spans=spans,
            check=check,
            names=tuple(f"message {turn + 1} ({messages[turn]['role']})" for turn in turns),
            without_stop_token=rendering.without_stop_token,
            is_plain_text=False,
            origin=conversation.origin,
            num_controls=rendering.num_controls,
            hidden=None,
        )

    def _count(self, rendering: Rendering, messages: Sequence[Message], turns: Sequence[int]) -> None:
        answers = [messages[turn] for turn in turns if messages[turn]["role"] == "assistant"]
        self._counts["answers"] += len(answers)
        self._counts["thoughts"] += sum(map(has_thoughts, answers))
        self._counts["thoughts_restored"] += len(rendering.restored)
        written = (rendering.text[start:end] for start, end in rendering.spans)
        self._counts["empty_thoughts"] += sum(bool(_NO_THOUGHTS.match(text)) for text in written)
        self._counts["unanswered"] += messages[-1]["role"] != "assistant" and len(messages) - 1 not in turns
        for turn in turns if self._train_on != "all" else ():
            self._counts[f"trained {messages[turn]['role']}"] += 1
        for number in rendering.without_stop_token:
            self._counts[f"without_stop_token {messages[turns[number]]['role']}"] += 1

    # ---- tokens

    def _labeled(self, text: RenderedText, tokens: Tokens | None) -> list[TokenMask]:
        if tokens is None:
            assert text.hidden is not None
            tokens = self._specials(text).tokens(text.hidden)
        labeled = self._label(text, tokens)
        if text.num_controls is not None and (found := self._specials(text).count_tokens(tokens)) != text.num_controls:
            raise BadRow(
                f"the tokenizer reads {found} special tokens where the chat template writes {text.num_controls}: a "
                "text "
                "would change the structure of the conversation"
            )
        return labeled

    def _specials(self, text: RenderedText) -> SpecialText:
        return self._text_specials if text.is_plain_text else self.template.special_text


def _second_spans(
    text: str,
    marked: Sequence[Span],
    rendering: Rendering,
    messages: Sequence[Message],
    tools: Tools,
    turns: Sequence[int],
    template: ChatTemplate,
) -> list[Span]:
    """Find the spans of the trained messages the second way, from `text`, the template's own rendering."""
    trained = [turn for turn in turns if messages[turn]["role"] == "assistant"]
    others = [turn for turn in turns if turn not in trained]
    if not trained:
        second = []
    elif template.has_markers and not rendering.restored:
        answers = trained_turns(messages, "assistant")
        found = spans_by_markers(text, marked, template)
        places = [
            answers.index(turn) - len(answers) for turn in trained
        ]  # from the end: some templates mark only the last
        second = [found[place] for place in places if -place <= len(found)]
    else:
        second = spans_by_prompting(text, messages, tools, trained, template)
    second = second + spans_by_difference(text, messages, tools, others, template)
    if len(second) != len(turns):  # markers may be missing, which the comparison finds
        return second
    by_turn = dict(zip([*trained, *others], second, strict=True))
    if not rendering.restored:
        return [by_turn[turn] for turn in turns]
    whole, moved = put_thoughts_back(text, by_turn, rendering.restored, messages, tools, template)
    if whole != rendering.text:
        raise BadRow(
            f"the chat template drops the thoughts of message {rendering.restored[0] + 1} (assistant), and two ways of "
            "putting them back disagree; data.thinking=strip trains without them"
        )
    return [moved[turn] for turn in turns]


def _after_start(text: str, spans: Sequence[Span], turns: Sequence[int], started: tuple[int, str]) -> list[Span]:
    """Return the spans without the beginning of an answer that belongs to its prompt.

    Raises:
        BadRow: The answer does not begin with it.
    """
    turn, beginning = started
    if turn not in turns or not beginning.strip():
        return list(spans)
    number = turns.index(turn)
    start, end = spans[number] if number < len(spans) else (0, 0)
    place = text.find(beginning.strip(), start, end)
    if place < 0 or without_thoughts(text[start:place]).strip():
        raise BadRow(f"the chat template does not begin message {turn + 1} (assistant) with what its prompt ends with")
    begin = place + len(beginning.strip())  # most tokenizers join blanks with the word after them, which is trained
    return [*spans[:number], (begin, end), *spans[number + 1 :]]


def _result_or_reason(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | str:
    """Return the result, or the reason why the row is rejected."""
    try:
        return work(*args, **kwargs)
    except BadRow as bad:
        return str(bad)
