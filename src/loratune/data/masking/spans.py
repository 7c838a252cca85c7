"""Character spans of trained messages, and where a message ends: shared by both ways of finding them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.masking.template import ChatTemplate, Tools

_EMPTY_THOUGHTS = r"<think>\s*(?:</think>\s*)?$"

Span = tuple[int, int]
"""The first character, and the one after the last."""


def first_stop(text: str, start: int, limit: int, stops: Sequence[str]) -> int | None:
    """Return where the first stop token in text[start:limit] ends; None if there is none."""
    found = [(position, len(stop)) for stop in stops if (position := text.find(stop, start, limit)) >= 0]
    if not found:
        return None
    position, length = min(found)
    return position + length


def message_end(
    text: str, start: int, limit: int, tail: str | None, tools: Tools, template: ChatTemplate
) -> int | None:
    """Return where a message of another role than the assistant's ends with a stop token of its own.

    Args:
        text: The conversation.
        start: Where the message's text ends.
        limit: The first character that belongs to the next message.
        tail: What the template writes after this text if it is the last one; None if that is unknown.
        tools: The tools of the conversation.
        template: The chat template.

    Returns:
        None if the template writes no stop token there, or writes tools before it.
    """
    end = first_stop(text, start, limit, template.turn_end_tokens)
    if end is None:
        return None
    between = text[start:end]
    # The token that starts the next message may be one that ends an answer: GLM's <|user|>.
    own = template.control_tokens.search(text, end, limit) is not None if tail is None else tail.startswith(between)
    return end if own and not any(tool["function"]["name"] in between for tool in tools or ()) else None


def blanks_before(text: str, start: int) -> int:
    """Return where a text starts including the blanks before it, which most tokenizers join with its first word."""
    return len(text[:start].rstrip(" "))


def header_variants(prompt: str) -> list[str]:
    """Return the forms in which a rendered prompt may occur in a rendered conversation, longest first.

    A template whose prompt opens the thoughts (`…<think>⏎`) may write earlier or thoughtless answers without them, or
    with an empty `<think></think>`.
    """
    return list(dict.fromkeys((prompt, prompt.rstrip(), without_thoughts(prompt))))


def without_thoughts(prompt: str) -> str:
    """Return a prompt without a `<think>` (open or empty) at its end."""
    return re.sub(_EMPTY_THOUGHTS, "", prompt)


def any_of(strings: Sequence[str] | set[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the strings, the longest that fits."""
    longest_first = sorted((s for s in strings if s), key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
