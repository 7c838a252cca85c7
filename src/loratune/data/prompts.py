"""The prompts that a server would send to the model, and the tokens that end its answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.data.masking.policy import Thinking, check_tool_support, trained_turns, with_thinking
from loratune.data.masking.special_tokens import special_token_in
from loratune.data.masking.template import ChatTemplate
from loratune.data.rows.conversation import Conversation, Message, split_thoughts
from loratune.run.errors import BadRow, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.rows.row import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a server would send to the model to get the last answer of a conversation."""

    input_ids: list[int]
    text: str
    """The text as the model reads it, with the template's tokens."""
    question: str
    """The messages before the answer without the system message, for people: one line each."""
    references: tuple[str, ...]
    """The last answers of all conversations with this prompt, without thoughts."""
    origin: Origin
    """Where the first of these conversations was read."""
    messages: tuple[Message, ...] = ()
    """The messages before the answer."""
    tools: tuple[dict[str, Any], ...] | None = None
    """JSON schemas of the functions that the assistant may call."""


def render_prompts(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: Thinking = "keep",
    limit: int | None = None,
) -> list[Prompt]:
    """Render the prompt of each last answer: all messages before it, and the template's own generation prompt.

    Conversations without an answer, and plain text, are left out. Conversations that differ only in their last answer
    share one prompt.

    Args:
        conversations: Validated conversations.
        tokenizer: A tokenizer with a chat template.
        thinking: `strip` removes the thoughts of earlier answers; otherwise the template decides about them.
        limit: Maximum number of prompts, counted from the first; None: all.

    Raises:
        DataError: The tokenizer has no chat template, or the template rejects a conversation.
    """
    asked = _by_prompt(conversations)[:limit]
    if not asked:
        return []
    template = ChatTemplate(tokenizer)
    texts = [_prompt_text(conversation, turn, template, thinking) for conversation, turn, _ in asked]
    ids = tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
    return [
        Prompt(
            input_ids=_as_text_ids(text, conversation, template) if hidden else list(plain),
            text=template.special_text.show(text) if hidden else text,
            question=_question(conversation.messages[:turn]),
            references=references,
            origin=conversation.origin,
            messages=conversation.messages[:turn],
            tools=conversation.tools,
        )
        for plain, (text, hidden), (conversation, turn, references) in zip(ids, texts, asked, strict=True)
    ]


def _by_prompt(conversations: Sequence[Conversation]) -> list[tuple[Conversation, int, tuple[str, ...]]]:
    """Return the first conversation of each distinct prompt, the index of the answer in it, and all answers."""
    found: dict[str, tuple[Conversation, int, dict[str, None]]] = {}
    for conversation in conversations:
        turns = trained_turns(conversation.messages, "last", conversation.excluded)
        if not turns or turns[-1] == 0:
            continue
        start = _started(conversation, turns[-1])
        key = json.dumps([conversation.messages[: turns[-1]], conversation.tools, start], sort_keys=True)
        _, _, references = found.setdefault(key, (conversation, turns[-1], {}))
        references[_reference(conversation.messages[turns[-1]], start)] = None
    return [(conversation, turn, tuple(references)) for conversation, turn, references in found.values()]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the tokens that end an answer: the template's end-of-turn and the end-of-sequence token.

    Raises:
        DataError: The template ends answers without a token, or there is no stop token at all.
    """
    stops = ChatTemplate(tokenizer).stop_tokens if tokenizer.chat_template else (tokenizer.eos_token,)
    known = tokenizer.get_vocab()
    ids = [known[stop] for stop in stops if stop in known]
    if not ids:
        raise DataError("the tokenizer has no end-of-sequence token", fix="set eos_token in tokenizer_config.json")
    return tuple(dict.fromkeys(ids))


def _prompt_text(conversation: Conversation, turn: int, template: ChatTemplate, thinking: Thinking) -> tuple[str, bool]:
    """Return the prompt, and whether names of special tokens in it are hidden."""
    messages, tools = conversation.messages[:turn], conversation.tools
    start = _started(conversation, turn)
    if start:
        messages = (*messages, {"role": "assistant", "content": start})
    hidden = bool(special_token_in(conversation, template.special_text))
    try:
        if hidden:
            messages, tools = template.special_text.hide((messages, tools))
        if thinking == "strip":
            messages = tuple(with_thinking(m, thinking, template, n) for n, m in enumerate(messages, start=1))
        check_tool_support(messages, tools, template)
        text = template.render(messages, tools, prompt=not start)
        return (_until(text, messages[-1]["content"].strip()) if start else text), hidden
    except BadRow as bad:
        raise _refusal(bad, conversation.origin) from None


def _until(text: str, end: str) -> str:
    """Return a text up to the last place of its end, where a server lets the model go on."""
    place = text.rfind(end)
    if place < 0:
        raise BadRow("the chat template does not write the beginning of the answer that its prompt ends with")
    return text[: place + len(end)]


def _as_text_ids(text: str, conversation: Conversation, template: ChatTemplate) -> list[int]:
    try:
        return list(template.special_text.tokens(text).ids.tolist())
    except BadRow as bad:
        raise _refusal(bad, conversation.origin) from None


def _refusal(bad: BadRow, origin: Origin) -> DataError:
    return DataError(str(bad), file=origin.file, line=origin.line, fix="correct this conversation")


def _question(messages: Sequence[Message]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages if message["role"] != "system")


def _started(conversation: Conversation, turn: int) -> str:
    """Return the beginning of an answer that belongs to its prompt."""
    started = conversation.started
    return started[1].rstrip() if started is not None and started[0] == turn else ""


def _reference(message: Message, start: str) -> str:
    content = message.get("content", "")
    content = content[len(start) :] if start else content
    parts = split_thoughts(content)
    return (parts[1] if parts else content).strip()


def longest_answer(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens of the longest reference with its stop token; 0 without prompts."""
    references = [reference for prompt in prompts for reference in prompt.references]
    return 1 + max(map(len, tokenizer(references, add_special_tokens=False)["input_ids"])) if references else 0
