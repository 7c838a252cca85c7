"""Conversations → verified examples: token ids, and which of them are trained.

The chat template renders each conversation; `spans` says which of its characters are the assistant's own, twice;
`labels` turns both into tokens, and compares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from loratune.data.examples import Example
from loratune.data.masking.spans_by_prompting import spans_by_difference, spans_by_markers, spans_by_prompting
from loratune.data.masking.spans_by_substitution import Rendering, Span, SubstitutionMatcher, has_text
from loratune.data.masking.special_tokens import SpecialText, special_names, special_notices, special_token_in
from loratune.data.masking.template import ChatTemplate, Tools
from loratune.data.masking.token_labels import (
    Encoder,
    LengthViolations,
    OnLong,
    RenderedText,
    TokenMask,
    TokenMasker,
    backend_of,
)
from loratune.data.masking.word_cache import Tokens
from loratune.data.masking.workers import WorkerPool, num_helpers
from loratune.data.rows.conversation import BadRow, Conversation, Message, Rejected, split_thoughts
from loratune.recipe.roles import TrainOn, as_written, trained_roles
from loratune.run.errors import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Thinking = Literal["keep", "strip", "error"]
SpecialTokensInText = Literal["error", "as_text"]

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["Chunk", "Example", "Policy", "Rendered", "Renderer", "render"]

CHUNK = 256
"""Conversations that are rendered and tokenised together, and that a process is given at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is trained, and what happens to thoughts and long examples; see `render`."""

    train_on: TrainOn
    thinking: Thinking
    max_length: int
    on_long: OnLong
    special_tokens_in_text: SpecialTokensInText


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """What became of some conversations: examples laid end to end, so that they are cheap to send and to keep."""

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]
    kept: npt.NDArray[np.int32]
    """Of each example, which of the conversations it is."""
    rejected: list[tuple[int, str]]
    """Which conversation cannot be trained on, and why."""
    counts: Counter[str]
    too_long: LengthViolations

    def examples(self, conversations: Sequence[Conversation]) -> Iterator[Example]:
        """The examples, as views."""
        stops = np.cumsum(self.lengths)
        for number, length, stop in zip(self.kept.tolist(), self.lengths.tolist(), stops.tolist(), strict=True):
            place = slice(stop - length, stop)
            origin = conversations[number].origin
            yield Example(input_ids=self.input_ids[place], supervised=self.supervised[place], origin=origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """What became of a list of conversations."""

    examples: list[Example]
    rejected: list[Rejected]
    counts: dict[str, int]
    """`verified`, `truncated`, `dropped_long`, `dropped_empty`, `straddling`, `thoughts`, `thoughts_restored`, …"""
    notices: list[str]
    """What the user should know, in sentences."""
    method: str
    """How the trained spans were found and checked."""


def render(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn,
    thinking: Thinking,
    max_length: int,
    on_long: OnLong,
    special_tokens_in_text: SpecialTokensInText = "error",
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rendered:
    """Render, tokenise and label conversations, and verify the labels.

    Args:
        conversations: Validated conversations.
        tokenizer: A fast tokenizer with a chat template (for plain text, it needs none).
        train_on: `assistant`, every answer; `last`, the last one; `all`, every token; a list of
            roles, every message of these.
        thinking: What happens to the thoughts in answers.
        max_length: The longest example, in tokens.
        on_long: What happens to a longer one.
        special_tokens_in_text: What happens to the names of special tokens in texts.
        processes: How many share the work; None: as many as repay their start. The result is the same.
        progress: Called with the number of conversations that were done since it was last called.

    Raises:
        DataError: The two ways of finding the trained tokens disagree; the tokenizer or its chat template cannot be
            trained with; an example is too long and `on_long` is `error`.
    """
    policy = Policy(
        train_on=train_on,
        thinking=thinking,
        max_length=max_length,
        on_long=on_long,
        special_tokens_in_text=special_tokens_in_text,
    )
    renderer = Renderer(tokenizer, policy)
    slices = [conversations[start : start + CHUNK] for start in range(0, len(conversations), CHUNK)]
    helpers = num_helpers(len(conversations)) if processes is None else processes - 1
    with WorkerPool(renderer, setup=(tokenizer, policy), num_helpers=min(helpers, len(slices) - 1)) as crew:
        chunks = crew.map(slices, progress)
    counts: Counter[str] = Counter()
    too_long = LengthViolations()
    for chunk in chunks:
        counts.update(chunk.counts)
        too_long.add(chunk.too_long)
    too_long.complain(max_length)
    templated = any(conversation.text is None for conversation in conversations)
    return Rendered(
        examples=[e for part, chunk in zip(slices, chunks, strict=True) for e in chunk.examples(part)],
        rejected=[
            Rejected(origin=part[number].origin, reason=reason)
            for part, chunk in zip(slices, chunks, strict=True)
            for number, reason in chunk.rejected
        ],
        counts=dict(counts),
        notices=[
            *special_notices(counts["special_tokens_in_text"], as_text=special_tokens_in_text == "as_text"),
            *(renderer.notices(counts) if templated else []),
        ],
        method=renderer.method if templated else "plain text: every token is trained",
    )


def trained_turns(messages: Sequence[Message], train_on: TrainOn, excluded: Sequence[int] = ()) -> list[int]:
    """The messages to be trained: those of the trained roles that have a text or calls, but for the `excluded` ones."""
    roles = trained_roles(train_on)
    turns = [
        n
        for n, message in enumerate(messages)
        if message["role"] in roles and n not in excluded and (message["role"] == "assistant" or has_text(message))
    ]
    return turns[-1:] if train_on == "last" else turns


# ---- conversations → texts and spans


class Renderer:
    """Conversations → examples, under one policy.

    Args:
        tokenizer: A fast one.
        policy: What to train.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> None:
        self._tokenizer = tokenizer
        self._train_on = policy.train_on
        self._thinking = policy.thinking
        self._encode = Encoder(backend_of(tokenizer))
        self._label = TokenMasker(tokenizer, max_length=policy.max_length, on_long=policy.on_long)
        self._as_text = policy.special_tokens_in_text == "as_text"
        self._text_specials: SpecialText | None = None
        self._trade: tuple[ChatTemplate, SubstitutionMatcher] | None = None
        self._counts: Counter[str] = Counter()

    def __call__(self, conversations: Sequence[Conversation]) -> Chunk:
        """Render, tokenise and label, in their order.

        Raises:
            DataError: As `render`.
        """
        self._counts = self._label.counts = Counter()
        too_long = self._label.too_long = LengthViolations()
        texts = [_result_or_reason(self._render, conversation) for conversation in conversations]
        encoded = iter(self._encode([t.text for t in texts if isinstance(t, RenderedText) and t.hidden is None]))
        results = [
            text if isinstance(text, str)
            # the words' own tokens, or those of a text in which names of special tokens are text
            else _result_or_reason(self._labelled, text, next(encoded) if text.hidden is None else None)
            for text in texts
        ]  # fmt: skip
        kept = [(number, result) for number, result in enumerate(results) if isinstance(result, tuple)]
        return Chunk(
            input_ids=np.concatenate([np.empty(0, np.int32), *(ids for _, (ids, _) in kept)]),
            supervised=np.concatenate([np.empty(0, np.bool_), *(supervised for _, (_, supervised) in kept)]),
            lengths=np.array([len(ids) for _, (ids, _) in kept], dtype=np.int32),
            kept=np.array([number for number, _ in kept], dtype=np.int32),
            rejected=[(number, result) for number, result in enumerate(results) if isinstance(result, str)],
            counts=self._counts,
            too_long=too_long,
        )

    def _labelled(self, text: RenderedText, tokens: Tokens | None) -> TokenMask | None:
        if tokens is None:
            assert text.hidden is not None
            tokens = self._specials(text).tokens(text.hidden)
        labelled = self._label(text, tokens)
        if text.num_controls is not None and (found := self._specials(text).count_tokens(tokens)) != text.num_controls:
            raise BadRow(
                f"the tokenizer reads {found} special tokens where the chat template writes {text.num_controls}: a text "
                "would change the structure of the conversation"
            )
        return labelled

    def _specials(self, text: RenderedText) -> SpecialText:
        if not text.is_plain_text:
            return self._template_and_matcher[0].special_text
        if self._text_specials is None:
            self._text_specials = SpecialText(self._tokenizer, special_names(self._tokenizer))
        return self._text_specials

    def _render(self, conversation: Conversation) -> RenderedText:
        if conversation.text is not None:
            return self._render_plain(conversation, conversation.text)
        template, substitution = self._template_and_matcher
        found = special_token_in(conversation, template.special_text)
        if found:
            self._counts["special_tokens_in_text"] += 1
            if not self._as_text:
                raise BadRow(found)
            messages, tools = template.special_text.hide((conversation.messages, conversation.tools))
            conversation = replace(conversation, messages=messages, tools=tools)
        text = self._render_chat(conversation, template, substitution)
        return replace(text, text=template.special_text.show(text.text), hidden=text.text) if found else text

    def _render_plain(self, conversation: Conversation, text: str) -> RenderedText:
        if self._train_on != "all":
            raise BadRow("plain text has no answers; train_on must be all")
        made = RenderedText(
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
        specials = self._specials(made)
        if not specials.names.search(text):
            return made
        self._counts["special_tokens_in_text"] += 1
        return replace(made, hidden=specials.hide(text), num_controls=0) if self._as_text else made

    def _render_chat(
        self, conversation: Conversation, template: ChatTemplate, substitution: SubstitutionMatcher
    ) -> RenderedText:
        messages = [with_thinking(m, self._thinking, template, n) for n, m in enumerate(conversation.messages, start=1)]
        tools = conversation.tools
        turns = trained_turns(messages, self._train_on, conversation.excluded)
        self._check_said(conversation)
        if not turns and self._train_on != "all":
            roles = trained_roles(self._train_on)
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
        _check_tools_written(text, conversation)
        rendering = substitution(text, messages, tools, turns)
        self._count(rendering, messages, turns)
        spans: list[Span] | None = None
        check: list[Span] | None = None
        if self._train_on != "all":
            spans = rendering.spans
            second = _second_spans(text, marked, rendering, messages, tools, turns, template)
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

    @property
    def _template_and_matcher(self) -> tuple[ChatTemplate, SubstitutionMatcher]:
        if self._trade is None:
            template = ChatTemplate(self._tokenizer)
            self._trade = template, SubstitutionMatcher(template)
        return self._trade

    def _check_said(self, conversation: Conversation) -> None:
        """What messages say of themselves must go with the recipe."""
        roles, messages = trained_roles(self._train_on), conversation.messages
        for n in conversation.forced_trained:
            if messages[n]["role"] not in roles and self._train_on != "all":
                raise BadRow(
                    f"message {n + 1} ({messages[n]['role']}) has train true, but data.train_on is "
                    f"{as_written(self._train_on)}, which does not train it"
                )
        if conversation.excluded and self._train_on == "all":
            n = conversation.excluded[0]
            raise BadRow(
                f"message {n + 1} ({messages[n]['role']}) has train false, but data.train_on is all, which trains every token"
            )
        self._counts["answers_not_trained"] += sum(messages[n]["role"] in roles for n in conversation.excluded)

    def _count(self, rendering: Rendering, messages: Sequence[Message], turns: Sequence[int]) -> None:
        answers = [messages[turn] for turn in turns if messages[turn]["role"] == "assistant"]
        self._counts["answers"] += len(answers)
        self._counts["thoughts"] += sum(map(_has_thoughts, answers))
        self._counts["thoughts_restored"] += rendering.num_restored
        self._counts["unanswered"] += messages[-1]["role"] != "assistant" and len(messages) - 1 not in turns
        for turn in turns if self._train_on != "all" else ():
            self._counts[f"trained {messages[turn]['role']}"] += 1
        for number in rendering.without_stop_token:
            self._counts[f"without_stop_token {messages[turns[number]]['role']}"] += 1

    @property
    def method(self) -> str:
        """How trained tokens are found and checked."""
        if self._train_on == "all":
            return "every token is trained"
        template, _ = self._template_and_matcher
        roles = trained_roles(self._train_on)
        ways = []
        if "assistant" in roles:
            ways.append("the template's generation markers" if template.has_markers else "rendered prompts")
        if set(roles) - {"assistant"}:
            ways.append("renderings with another text in a message's place")
        return f"sentinel substitution, checked against {' and '.join(ways)}"

    def notices(self, counts: Counter[str]) -> list[str]:
        """What the user should know about the chat template and this data."""
        notices: list[str] = []
        template, _ = self._template_and_matcher
        if counts["thoughts_restored"]:
            notices.append(
                f"The chat template drops the thoughts of {plural(counts['thoughts_restored'], 'answer')}. They were put back and "
                "are trained (data.thinking=keep); data.thinking=strip trains without them."
            )
        thoughtless = counts["answers"] - counts["thoughts"]
        if template.opens_thoughts and thoughtless and self._train_on != "all":
            notices.append(
                f"The chat template's generation prompt opens <think>, but {thoughtless} of {counts['answers']} trained "
                "answers have no thoughts: when it is used, the model is prompted for thoughts it was not trained to have."
            )
        if template.forbids_thoughts and counts["thoughts"]:
            notices.append(
                "The chat template's generation prompt ends with empty thoughts, but "
                f"{plural(counts['thoughts'], 'trained answer has', 'trained answers have')} some: when it is used, the model is prompted to answer without them."
            )
        if number := counts["answers_not_trained"]:
            what = "answer" if trained_roles(self._train_on) == ("assistant",) else "message"
            said = f"{what} has train: false and is not trained.", f"{what}s have train: false and are not trained."
            notices.append(plural(number, *said))
        if number := counts["unanswered"]:
            ends = plural(number, "conversation ends", "conversations end")
            notices.append(f"{ends} with a message that has no answer.")
        if without_stop_token := {
            role: n for role in trained_roles(self._train_on) if (n := counts[f"without_stop_token {role}"])
        }:
            which = " and ".join(
                plural(n, f"message of {role}", f"messages of {role}") for role, n in without_stop_token.items()
            )
            notices.append(
                f"The chat template writes {which} without a stop token of their own: the texts are trained, but not where they end."
            )
        if template.writes_date:
            notices.append(
                "The chat template writes today's date into every conversation: tomorrow's tokens will differ."
            )
        if counts["straddling"]:
            both = "both what the template writes and the start of a trained text;"
            said = f"token holds {both} it is not trained.", f"tokens hold {both} they are not trained."
            notices.append(plural(counts["straddling"], *said))
        return notices


def _second_spans(
    text: str,
    marked: Sequence[Span],
    rendering: Rendering,
    messages: Sequence[Message],
    tools: Tools,
    turns: Sequence[int],
    template: ChatTemplate,
) -> list[Span]:
    """The spans of the trained messages, found the second way; `text` and `marked` are of the template's own rendering."""
    trained = [turn for turn in turns if messages[turn]["role"] == "assistant"]
    others = [turn for turn in turns if turn not in trained]
    if not trained:
        second = []
    elif template.has_markers and not rendering.num_restored:
        answers = trained_turns(messages, "assistant")
        found = spans_by_markers(text, marked, template)
        places = [answers.index(turn) - len(answers) for turn in trained]  # from the end: some mark the last alone
        second = [found[place] for place in places if -place <= len(found)]
    else:
        second = spans_by_prompting(rendering.text, messages, tools, trained, template)
    return second + spans_by_difference(rendering.text, text, messages, tools, others, template)


def _result_or_reason(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | str:
    """The result, or why the row is refused."""
    try:
        return work(*args, **kwargs)
    except BadRow as bad:
        return str(bad)


def _has_thoughts(message: Message) -> bool:
    return "reasoning_content" in message or split_thoughts(message.get("content", "")) is not None


def with_thinking(message: Message, thinking: Thinking, template: ChatTemplate, number: int) -> Message:
    """The message under the policy. Thoughts move to the template's own field, if it reads one.

    Raises:
        BadRow: Its thoughts do not end, are refused by the policy, or no answer follows them.
    """
    if message["role"] != "assistant":
        return message
    content = message.get("content", "")
    inline = split_thoughts(content) if "reasoning_content" not in message else None
    thoughts = inline[0] if inline else message.get("reasoning_content")
    if thoughts is None:
        if thinking != "keep" and content.lstrip().startswith("<think>"):
            raise BadRow(f"message {number} (assistant) starts with thoughts that do not end")
        return message
    if thinking == "error":
        raise BadRow(f"message {number} (assistant) has thoughts, and data.thinking is error")
    answer = inline[1].lstrip() if inline else content
    if not answer.strip() and not message.get("tool_calls"):
        raise BadRow(f"message {number} (assistant) has thoughts, but no answer")
    bare = {name: value for name, value in message.items() if name not in ("content", "reasoning_content")}
    if answer:
        bare["content"] = answer
    if thinking == "strip" or (not thoughts.strip() and template.thoughts is not None):
        return bare
    if template.thoughts is not None:
        return {**bare, "reasoning_content": thoughts.strip()}
    return message if inline else {**bare, "content": f"<think>\n{thoughts.strip()}\n</think>\n\n{answer}"}


def check_tool_support(messages: Sequence[Message], tools: Tools, template: ChatTemplate) -> None:
    """Whether the template writes what the conversation has of tools.

    Raises:
        BadRow: It does not.
    """
    calls = any("tool_calls" in message for message in messages)
    if not calls and not tools:
        return
    supported = template.supports_tools  # asked in any case: it settles how tools are rendered
    if calls and not supported:
        raise BadRow("the chat template does not write tool calls")


def _check_tools_written(text: str, conversation: Conversation) -> None:
    for tool in conversation.tools or ():
        if tool["function"]["name"] not in text:
            raise BadRow(f"the chat template drops the tools: {tool['function']['name']} is not in its text")
