"""A validated conversation: a list of messages as chat templates expect them.

A message has `role` and `content`, and optionally `reasoning_content`, `tool_calls` (with arguments as a dictionary),
`tool_call_id` and `name`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratune.data.rows.row import Origin

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One validated row."""

    messages: tuple[Message, ...]
    """Empty for plain text."""
    tools: tuple[dict[str, Any], ...] | None
    """JSON schemas of the functions that the assistant may call."""
    text: str | None
    """The text of a plain-text row, else None."""
    origin: Origin
    excluded: tuple[int, ...] = ()
    """Indices of the messages that are not trained: by their own flag, or as a part of a prompt."""
    forced_trained: tuple[int, ...] = ()
    """Indices of the messages of other roles than the assistant's that the row says to train."""
    given: tuple[int, ...] = ()
    """Indices of the answers that are part of a prompt; all of them are excluded."""
    started: tuple[int, str] | None = None
    """Index of an answer whose beginning is part of the prompt, and that beginning."""


def split_thoughts(content: str) -> tuple[str, str] | None:
    """Split `<think>thoughts</think>answer` into thoughts and answer, as written; None if there are no thoughts.

    The opening tag may be missing: templates such as DeepSeek-R1's write it into the prompt, so recorded outputs of
    those models start with the thoughts.
    """
    before, closing, answer = content.partition("</think>")
    if not closing:
        return None
    opened = before.lstrip()
    if opened.startswith("<think>"):
        return opened.removeprefix("<think>"), answer
    return None if "<think>" in before else (before, answer)


def thoughts_before(content: str, *, opened: bool) -> str:
    """Return what stands before the answer in a content with thoughts, as reasoning models write it.

    Args:
        content: The content of an answer with thoughts.
        opened: Whether the prompt opens `<think>`, which decides the form; otherwise it is that of the content.
    """
    parts = split_thoughts(content)
    assert parts is not None
    thoughts, answer = parts
    return f"<think>\n{thoughts.strip()}\n</think>\n\n" if opened else content[: len(content) - len(answer.lstrip())]


def has_text(message: Message) -> bool:
    """Whether a message has a text that is not blank."""
    return bool(message.get("content", "").strip())
