"""Conversations → verified examples: token ids, and which of them are trained.

The chat template renders each conversation. `spans_by_substitution` and `spans_by_prompting` find the trained
characters in two independent ways; `token_labels` turns both into token masks and compares them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.data.masking.notices import special_token_notices, split_notices
from loratune.data.masking.renderer import Renderer
from loratune.data.masking.token_labels import LengthViolations
from loratune.data.masking.workers import WorkerPool, num_workers
from loratune.data.rows.row import Rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.data.masking.policy import Policy
    from loratune.data.rows.conversation import Conversation

CHUNK = 256
"""Conversations that are rendered and tokenized together, and that a worker is given at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """The results of a list of conversations."""

    examples: list[Example]
    rejected: list[Rejected]
    counts: dict[str, int]
    """`verified`, `truncated`, `dropped_long`, `dropped_empty`, `straddling`, `thoughts`, `thoughts_restored`, …"""
    notices: list[str]
    """What the user should know, in sentences."""
    num_rows: int
    """Conversations that became examples."""
    method: str
    """How the trained spans were found and verified."""


def render(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    *,
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rendered:
    """Render, tokenize and mask conversations, and verify the masks.

    Args:
        conversations: Validated conversations.
        tokenizer: A fast tokenizer, with a chat template unless all conversations are plain text.
        policy: What to train.
        processes: Number of processes that share the work; None: as many as repay their start. The result is the same.
        progress: Called with the number of conversations finished since the last call.

    Raises:
        DataError: The two ways of finding the trained tokens disagree; the tokenizer or its chat template cannot be
            trained with; an example is too long and `on_long` is `error`.
    """
    renderer = Renderer(tokenizer, policy)
    slices = [conversations[start : start + CHUNK] for start in range(0, len(conversations), CHUNK)]
    workers = num_workers(len(conversations)) if processes is None else processes - 1
    with WorkerPool(renderer, setup=(tokenizer, policy), num_workers=min(workers, len(slices) - 1)) as pool:
        chunks = pool.map(slices, progress)
    counts: Counter[str] = Counter()
    too_long = LengthViolations()
    for chunk in chunks:
        counts.update(chunk.counts)
        too_long.add(chunk.too_long)
    too_long.raise_if_any(policy.max_length)
    templated = any(conversation.text is None for conversation in conversations)
    as_text = policy.special_tokens_in_text == "as_text"
    return Rendered(
        examples=[e for part, chunk in zip(slices, chunks, strict=True) for e in chunk.examples(part)],
        rejected=[
            Rejected(origin=part[number].origin, reason=reason)
            for part, chunk in zip(slices, chunks, strict=True)
            for number, reason in chunk.rejected
        ],
        counts=dict(counts),
        num_rows=sum(len(set(chunk.kept.tolist())) for chunk in chunks),
        notices=[
            *special_token_notices(counts["special_tokens_in_text"], as_text=as_text),
            *split_notices(counts["split"]),
            *(renderer.notices(counts) if templated else []),
        ],
        method=renderer.method if templated else "plain text: every token is trained",
    )
