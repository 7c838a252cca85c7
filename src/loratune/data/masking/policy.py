"""What is trained, and in which form: the masking policy, applied to the messages of one conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from loratune.data.rows.conversation import Conversation, Message, has_text, split_thoughts
from loratune.recipe.roles import TrainOn, as_written, trained_roles
from loratune.run.errors import BadRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.masking.template import ChatTemplate, Tools
    from loratune.data.masking.token_labels import OnLong
    from loratune.recipe.recipe import DataSection

Thinking = Literal["keep", "strip", "error"]
SpecialTokensInText = Literal["error", "as_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which tokens are trained, and what happens to thoughts, long examples and special tokens in texts.

    The fields are those of the recipe's data section, with `max_length` in tokens.
    """

    train_on: TrainOn
    thinking: Thinking
    max_length: int
    on_long: OnLong
    special_tokens_in_text: SpecialTokensInText = "error"

    @classmethod
    def of(cls, data: DataSection, max_length: int) -> Self:
        """Return the policy of a data section.

        Args:
            data: The data section.
            max_length: The maximum length of an example in tokens, with `auto` resolved.
        """
        return cls(
            train_on=data.train_on,
            thinking=data.thinking,
            max_length=max_length,
            on_long=data.on_long,
            special_tokens_in_text=data.special_tokens_in_text,
        )


def trained_turns(messages: Sequence[Message], train_on: TrainOn, excluded: Sequence[int] = ()) -> list[int]:
    """Return the indices of the trained messages: those of the trained roles that say something.

    Args:
        messages: The messages of a conversation.
        train_on: The policy.
        excluded: Indices of messages that the row says not to train.
    """
    roles = trained_roles(train_on)
    turns = [
        n
        for n, message in enumerate(messages)
        if message["role"] in roles and n not in excluded and (message["role"] == "assistant" or has_text(message))
    ]
    return turns[-1:] if train_on == "last" else turns


def has_thoughts(message: Message) -> bool:
    """Whether an answer has thoughts, in their own field or inside `<think>`."""
    return "reasoning_content" in message or split_thoughts(message.get("content", "")) is not None


def check_train_flags(conversation: Conversation, train_on: TrainOn) -> None:
    """Check that the `train` flags of messages agree with `data.train_on`.

    Raises:
        BadRow: A flag asks for what the recipe does not train, or excludes what `all` trains.
    """
    roles, messages = trained_roles(train_on), conversation.messages
    for n in conversation.forced_trained:
        if messages[n]["role"] not in roles and train_on != "all":
            raise BadRow(
                f"message {n + 1} ({messages[n]['role']}) has train true, but data.train_on is "
                f"{as_written(train_on)}, which does not train it"
            )
    flagged = [n for n in conversation.excluded if n not in conversation.given]
    if flagged and train_on == "all":
        n = flagged[0]
        raise BadRow(
            f"message {n + 1} ({messages[n]['role']}) has train false, but data.train_on is all, which trains every "
            "token"
        )


def with_thinking(
    message: Message, thinking: Thinking, template: ChatTemplate, number: int, *, trained: bool = True
) -> Message:
    """Return the message under the `thinking` policy; thoughts move to the template's own field if it reads one.

    Args:
        message: The message.
        thinking: The policy.
        template: The chat template.
        number: The number of the message, from 1, for error messages.
        trained: Whether the message is trained. In others, the template decides about thoughts.

    Raises:
        BadRow: The thoughts do not end, are refused by the policy, or no answer follows them; or the template has no
            place for them in an answer of this kind.
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
    calls = "tool_calls" in message
    written = template.writes_thoughts(calls=calls)
    if thinking == "strip" or (not thoughts.strip() and written):
        return bare
    elsewhere = template.writes_thoughts(calls=not calls)
    if written or (elsewhere and not trained):
        return {**bare, "reasoning_content": thoughts.strip()}
    if elsewhere:
        kinds = ("with tool calls", "without tool calls")
        raise BadRow(
            f"message {number} (assistant) has thoughts, and the chat template writes none in an answer "
            f"{kinds[not calls]}, only in one {kinds[calls]}; data.thinking=strip trains without them"
        )
    return message if inline else {**bare, "content": f"<think>\n{thoughts.strip()}\n</think>\n\n{answer}"}


def check_tool_support(messages: Sequence[Message], tools: Tools, template: ChatTemplate) -> None:
    """Check that the template writes the conversation's tool calls.

    Raises:
        BadRow: It does not.
    """
    calls = any("tool_calls" in message for message in messages)
    if not calls and not tools:
        return
    supported = template.supports_tools  # evaluated in any case: it also settles how tools are rendered
    if calls and not supported:
        raise BadRow("the chat template does not write tool calls")
