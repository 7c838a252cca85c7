"""Conversations → verified examples: token ids, and which of them are trained.

The chat template renders each conversation once; the texts are tokenised in batches; character spans become labels.
A token is trained if the whole of it belongs to a trained answer.
"""

from __future__ import annotations

import copy
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from loratune.data.conversation import BadRow, Conversation, Message, Origin, Rejected, split_thoughts
from loratune.data.spans import Span, Substitution, spans_by_markers, spans_by_prompting
from loratune.data.template import ChatTemplate
from loratune.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]
Thinking = Literal["keep", "strip", "error"]
OnLong = Literal["error", "truncate", "drop"]

CHUNK = 512
"""Conversations that are rendered and tokenised together; enough to keep the tokenizer's threads busy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One tokenised conversation."""

    input_ids: npt.NDArray[np.int32]
    """[T]"""
    supervised: npt.NDArray[np.bool_]
    """[T] Whether token t carries loss; it is predicted from the tokens before it, so position 0 never does."""
    origin: Origin


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a server would send to the model to get the last answer of a conversation."""

    input_ids: list[int]
    text: str
    reference: str
    """The last answer, without its thoughts."""
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """A rendered conversation, before tokenising."""

    text: str
    spans: list[Span] | None
    """None: every token is trained."""
    check: list[Span] | None
    """The spans as found the second way, where they differ by character."""
    plain: bool
    origin: Origin


def render(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn,
    thinking: Thinking,
    max_length: int,
    on_long: OnLong,
    progress: Callable[[int, int], None] | None = None,
) -> Rendered:
    """Render, tokenise and label conversations, and verify the labels.

    Args:
        conversations: Validated conversations.
        tokenizer: A fast tokenizer with a chat template (for plain text, it needs none).
        train_on: `assistant`, every answer; `last`, the last one; `all`, every token.
        thinking: What happens to the thoughts in answers.
        max_length: The longest example, in tokens.
        on_long: What happens to a longer one.
        progress: Called with the number of conversations done, and their total.

    Raises:
        DataError: The two ways of finding the trained tokens disagree; the tokenizer or its chat template cannot be
            trained with; an example is too long and `on_long` is `error`.
    """
    work = _Work(tokenizer, train_on=train_on, thinking=thinking)
    label = _Labels(tokenizer, max_length=max_length, on_long=on_long, counts=work.counts, rejected=work.rejected)
    examples: list[Example] = []
    for start in range(0, len(conversations), CHUNK):
        chunk = conversations[start : start + CHUNK]
        examples.extend(label(list(work.render(chunk))))
        if progress is not None:
            progress(start + len(chunk), len(conversations))
    label.finish()
    return Rendered(
        examples=examples,
        rejected=work.rejected,
        counts=dict(work.counts),
        notices=work.notices(),
        method=work.method,
    )


def render_prompts(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts for the last answers: all messages before it, and the template's own generation prompt.

    Conversations without an answer, and plain text, have none and are left out.

    Raises:
        DataError: The tokenizer has no chat template, or it refuses a conversation.
    """
    asked = [(conversation, _turns(conversation.messages, "last")) for conversation in conversations]
    asked = [(conversation, turns) for conversation, turns in asked if turns and turns[-1] > 0]
    if not asked:
        return []
    template = ChatTemplate(tokenizer)
    texts = [_prompt_text(conversation, turns[-1], template) for conversation, turns in asked]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        Prompt(input_ids=list(i), text=t, reference=_reference(c.messages[turns[-1]]), origin=c.origin)
        for i, t, (c, turns) in zip(ids, texts, asked, strict=True)
    ]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: the template's end-of-turn tokens, and the end-of-sequence token.

    Raises:
        DataError: The template ends answers with no token, or there is no stop token at all.
    """
    stops = ChatTemplate(tokenizer).stops if tokenizer.chat_template else (tokenizer.eos_token,)
    ids = tokenizer.convert_tokens_to_ids([stop for stop in stops if stop])
    if not ids:
        raise DataError("the tokenizer has no end-of-sequence token", fix="set eos_token in tokenizer_config.json")
    return tuple(dict.fromkeys(ids))


def _prompt_text(conversation: Conversation, turn: int, template: ChatTemplate) -> str:
    if conversation.tools or any("tool_calls" in message for message in conversation.messages):
        template.prepare_tools()
    try:
        return template.render(conversation.messages[:turn], conversation.tools, prompt=True)
    except BadRow as bad:
        origin = conversation.origin
        raise DataError(str(bad), file=origin.file, line=origin.line, fix="correct this conversation") from None


def _reference(message: Message) -> str:
    content = message.get("content", "")
    parts = split_thoughts(content)
    return (parts[1] if parts else content).strip()


def _turns(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    """The messages to be trained."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return turns[-1:] if train_on == "last" else turns


# ---- conversations → texts and spans


class _Work:
    """Rendering under one policy; counts and rejections add up over chunks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn, thinking: Thinking) -> None:
        self._tokenizer = tokenizer
        self._train_on: TrainOn = train_on
        self._thinking: Thinking = thinking
        self._template: ChatTemplate | None = None
        self._substitution: Substitution | None = None
        self.counts: Counter[str] = Counter()
        self.rejected: list[Rejected] = []

    def render(self, conversations: Sequence[Conversation]) -> Iterator[_Text]:
        for conversation in conversations:
            try:
                yield self._render(conversation)
            except BadRow as bad:
                self.rejected.append(Rejected(origin=conversation.origin, reason=str(bad)))

    def _render(self, conversation: Conversation) -> _Text:
        if conversation.text is not None:
            if self._train_on != "all":
                raise BadRow("plain text has no answers; train_on must be all")
            return _Text(text=conversation.text, spans=None, check=None, plain=True, origin=conversation.origin)
        template, substitution = self._tools_of_the_trade()
        messages = self._with_policy(conversation, template)
        tools = conversation.tools
        turns = _turns(messages, self._train_on)
        if not turns and self._train_on != "all":
            raise BadRow("no assistant turn: nothing to train")
        if tools or any("tool_calls" in message for message in messages):
            template.prepare_tools()
        marked: list[Span] = []
        if template.has_markers and self._train_on != "all":
            text, marked = template.render_marked(messages, tools)
        else:
            text = template.render(messages, tools)
        _check_tools_written(text, conversation)
        rendering = substitution(text, messages, tools, turns)
        self._count(rendering.num_restored, messages, turns)
        if self._train_on == "all":
            return _Text(text=rendering.text, spans=None, check=None, plain=False, origin=conversation.origin)
        if marked and not rendering.num_restored:
            second = spans_by_markers(text, marked, template)[-len(turns) :]
        else:
            second = spans_by_prompting(rendering.text, messages, tools, turns, template)
        check = None if second == rendering.spans else second
        return _Text(text=rendering.text, spans=rendering.spans, check=check, plain=False, origin=conversation.origin)

    def _tools_of_the_trade(self) -> tuple[ChatTemplate, Substitution]:
        if self._template is None or self._substitution is None:
            self._template = ChatTemplate(self._tokenizer)
            self._substitution = Substitution(self._template)
        return self._template, self._substitution

    def _with_policy(self, conversation: Conversation, template: ChatTemplate) -> list[Message]:
        _check_forging(conversation, template)
        return [_with_thinking(m, self._thinking, template, n) for n, m in enumerate(conversation.messages, start=1)]

    def _count(self, num_restored: int, messages: Sequence[Message], turns: Sequence[int]) -> None:
        with_thoughts = sum(1 for turn in turns if _has_thoughts(messages[turn]))
        self.counts["answers"] += len(turns)
        self.counts["thoughts"] += with_thoughts
        self.counts["thoughts_restored"] += num_restored
        self.counts["unanswered"] += messages[-1]["role"] != "assistant"

    @property
    def method(self) -> str:
        if self._template is None:
            return "plain text: every token is trained"
        if self._train_on == "all":
            return "every token is trained"
        second = "the template's generation markers" if self._template.has_markers else "rendered prompts"
        return f"sentinel substitution, checked against {second}"

    def notices(self) -> list[str]:
        notices: list[str] = []
        template, counts = self._template, self.counts
        if template is None:
            return notices
        if counts["thoughts_restored"]:
            notices.append(
                f"The chat template drops the thoughts of {counts['thoughts_restored']} answers. They were put back and "
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
                f"The chat template's generation prompt ends with empty thoughts, but {counts['thoughts']} trained answers "
                "have some: when it is used, the model is prompted to answer without them."
            )
        if counts["unanswered"]:
            notices.append(f"{counts['unanswered']} conversations end with a message that has no answer.")
        if template.writes_date:
            notices.append(
                "The chat template writes today's date into every conversation: tomorrow's tokens will differ."
            )
        if counts["straddling"]:
            notices.append(
                f"{counts['straddling']} tokens hold both the end of a header and the start of an answer; they are not trained."
            )
        return notices


def _has_thoughts(message: Message) -> bool:
    return "reasoning_content" in message or split_thoughts(message.get("content", "")) is not None


def _with_thinking(message: Message, thinking: Thinking, template: ChatTemplate, number: int) -> Message:
    """The message under the policy. Thoughts move to the template's own field, if it reads one."""
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


def _check_forging(conversation: Conversation, template: ChatTemplate) -> None:
    """A special token inside a text would be tokenised as one, and could start or end a turn."""
    for number, message in enumerate(conversation.messages, start=1):
        for text in _texts_of(message):
            found = template.forging.search(text)
            if found:
                raise BadRow(f"message {number} ({message['role']}) contains the special token {found[0]}")


def _texts_of(message: Message) -> Iterator[str]:
    yield message.get("content", "")
    if "reasoning_content" in message:
        yield message["reasoning_content"]
    if "tool_calls" in message:
        yield str(message["tool_calls"])


def _check_tools_written(text: str, conversation: Conversation) -> None:
    for tool in conversation.tools or ():
        if tool["function"]["name"] not in text:
            raise BadRow(f"the chat template drops the tools: {tool['function']['name']} is not in its text")


# ---- texts → examples


@dataclass(slots=True, kw_only=True)
class _Long:
    """Examples over the limit, under `on_long: error`."""

    count: int = 0
    first: Origin | None = None
    longest: int = 0


class _Labels:
    """Tokenises texts and labels their tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        on_long: OnLong,
        counts: Counter[str],
        rejected: list[Rejected],
    ) -> None:
        self._backend = _offsets_backend(tokenizer)
        self._max_length = max_length
        self._on_long = on_long
        self._counts = counts
        self._rejected = rejected
        self._long = _Long()
        self._frame = _text_frame(tokenizer)

    def __call__(self, texts: list[_Text]) -> list[Example]:
        encodings = self._backend.encode_batch([text.text for text in texts], add_special_tokens=False)
        decoded = self._backend.decode_batch([e.ids for e in encodings], skip_special_tokens=False)
        examples: list[Example] = []
        for text, encoding, back in zip(texts, encodings, decoded, strict=True):
            try:
                _check_round_trip(text.text, back, encoding, self._backend)
                example = self._fit(self._label(text, encoding))
            except BadRow as bad:
                self._rejected.append(Rejected(origin=text.origin, reason=str(bad)))
                continue
            if example is not None:
                examples.append(example)
        return examples

    def finish(self) -> None:
        """Complain about long examples, once all are known."""
        if self._long.first is not None:
            raise DataError(
                f"{self._long.count} examples are longer than max_length {self._max_length}; the longest has "
                f"{self._long.longest} tokens",
                file=self._long.first.file,
                line=self._long.first.line,
                fix="raise data.max_length, or set data.on_long to truncate or drop",
            )

    def _label(self, text: _Text, encoding: Encoding) -> Example:
        ids = np.array(encoding.ids, dtype=np.int32)
        if text.plain:
            ids = self._frame.around(ids)
        if text.spans is None:
            supervised = np.ones(len(ids), dtype=np.bool_)
        else:
            supervised = self._mask(text, text.spans, encoding)
            self._counts["verified"] += 1
            if text.check is not None and not np.array_equal(supervised, self._mask(text, text.check, encoding)):
                raise _disagreement(text)
        supervised[:1] = False
        if not supervised.any():
            raise BadRow("nothing to train")
        return Example(input_ids=ids, supervised=supervised, origin=text.origin)

    def _mask(self, text: _Text, spans: Sequence[Span], encoding: Encoding) -> npt.NDArray[np.bool_]:
        mask = np.zeros(len(encoding), dtype=np.bool_)
        for start, end in spans:
            first, last, straddles = _tokens_of(encoding, text.text, start, end)
            self._counts["straddling"] += straddles
            mask[first : last + 1] = True
        return mask

    def _fit(self, example: Example) -> Example | None:
        """The example within `max_length`, or None where it is dropped."""
        length = len(example.input_ids)
        if length <= self._max_length:
            return example
        if self._on_long == "error":
            self._long.count += 1
            self._long.longest = max(self._long.longest, length)
            self._long.first = self._long.first or example.origin
            return None
        if self._on_long == "drop":
            self._counts["dropped_long"] += 1
            return None
        supervised = example.supervised[: self._max_length]
        if not supervised.any():
            self._counts["dropped_empty"] += 1
            return None
        self._counts["truncated"] += 1
        return Example(input_ids=example.input_ids[: self._max_length], supervised=supervised, origin=example.origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What goes around plain text: the tokenizer's own start, and the end-of-sequence token, so that it learns to stop."""

    start: tuple[int, ...]
    end: tuple[int, ...]

    def around(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        start = () if tuple(ids[: len(self.start)]) == self.start else self.start
        end = () if tuple(ids[len(ids) - len(self.end) :]) == self.end else self.end
        return np.concatenate([np.array(start, np.int32), ids, np.array(end, np.int32)])


def _text_frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((tuple(full[:n]) for n in range(len(full)) if full[n : n + len(plain)] == plain), ())
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return _Frame(start=start, end=end)


def _offsets_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's Rust core, set to give the true extent of each token.

    A copy, because the original is what a run saves; without a post-processor, because that adds special tokens and,
    in byte-level tokenizers, cuts blanks off the offsets, which would hide a token that reaches into a header.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not say where in the text its tokens are",
            fix="take a model with a fast tokenizer (tokenizer.json)",
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    return backend


def _tokens_of(encoding: Encoding, text: str, start: int, end: int) -> tuple[int, int, bool]:
    """The tokens of a span: first, last, and whether one reaches into it from before (that one is left out)."""
    first = last = None
    for position in range(start, end):  # a tokenizer may give no token to a blank, so ask on
        first = encoding.char_to_token(position)
        if first is not None:
            break
    for position in range(end - 1, start - 1, -1):
        last = encoding.char_to_token(position)
        if last is not None:
            break
    if first is None or last is None:
        raise BadRow("an answer has no tokens")
    straddles = encoding.token_to_chars(first)[0] < start
    beyond = text[end : encoding.token_to_chars(last)[1]]
    if beyond.strip():
        raise BadRow(f"the last token of an answer holds text after it: {beyond!r}")
    return first + straddles, last, straddles


def _check_round_trip(text: str, back: str, encoding: Encoding, backend: Tokenizer) -> None:
    """What is trained must be what is in the data: no unknown characters, no lost ones."""
    if back == text or _nfc(back) == _nfc(text):
        return
    # Special tokens may swallow the blanks beside them (Phi-3); the text between two of them must still be the same.
    specials = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    offsets = encoding.offsets
    start = 0
    ids = encoding.ids
    for stop in [*(n for n, i in enumerate(ids) if i in specials), len(ids)]:
        if stop > start:
            original = text[offsets[start][0] : offsets[stop - 1][1]]
            decoded = backend.decode(ids[start:stop], skip_special_tokens=False)
            if _nfc(original).strip() != _nfc(decoded).strip():
                raise BadRow(f"the tokenizer cannot write it: {_difference(original, decoded)}")
        start = stop + 1


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _difference(original: str, decoded: str) -> str:
    at = len(os.path.commonprefix([original, decoded]))
    return f"{original[max(0, at - 10) : at + 20]!r} becomes {decoded[max(0, at - 10) : at + 20]!r}"


def _disagreement(text: _Text) -> DataError:
    assert text.spans is not None
    assert text.check is not None
    first = [text.text[start:end] for start, end in text.spans]
    second = [text.text[start:end] for start, end in text.check]
    return DataError(
        "two ways of finding the trained tokens disagree about this conversation, so it cannot be trained:\n"
        f"  by substitution: {first}\n  by its own marks or prompts: {second}",
        file=text.origin.file,
        line=text.origin.line,
        fix="the chat template is at fault, or this conversation is one it was not written for; another model's "
        "tokenizer, or data.train_on=all",
    )
