"""What happened to a run beside its ordinary steps: skipped steps, leaping losses, memory that ran out, what failed."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.reporting.blocks import Block, Paragraph, Table
from loratune.reporting.files import RunFiles

_MOST = 20


def events(files: RunFiles) -> Iterator[Block]:
    """The section; nothing where nothing happened."""
    if not files.events:
        return
    yield Table(
        caption="Beside the ordinary steps, as metrics.jsonl has it",
        columns=("step", "what happened"),
        rows=tuple((f"{event['step']:,}", event["message"]) for event in files.events[:_MOST]),
    )
    if len(files.events) > _MOST:
        yield Paragraph(text=f"{len(files.events) - _MOST:,} more in metrics.jsonl.")
