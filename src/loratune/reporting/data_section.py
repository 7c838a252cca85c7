"""The section on a run's data: what was read, what it became, and how long it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from loratune.reporting.blocks import Block, Chart, Charts, Fold, Items, Paragraph, Table
from loratune.reporting.charts import draw_histogram
from loratune.reporting.samples_section import last_part, place_of
from loratune.run.errors import plural
from loratune.run.records.data import DataRecord, SideReport, SourceRead, SplitOff

if TYPE_CHECKING:
    from loratune.reporting.run_files import RunFiles

_MAX_LINES = 20


def data(files: RunFiles) -> Iterator[Block]:
    """Build the section."""
    record = files.data
    if record is None:
        return
    sides = [(name, side) for name, side in (("training", record.train), ("held-out", record.eval)) if side is not None]
    if record.notices:
        yield Items(lines=record.notices)
    yield _counts(record, sides, files.task.example)
    yield Paragraph(
        text=f"Trained tokens were determined in two independent ways, which agree ({record.mask.method})."
        if record.mask.verified
        else f"Trained tokens: {record.mask.method}."
    )
    charts = [chart for name, side in sides for chart in _length_chart(name, side, files.task.example)]
    if charts:
        yield Charts(charts=tuple(charts))
    sources = [_source(name, source, files.task.example) for name, side in sides for source in side.sources]
    yield Fold(title="Sources", blocks=(Items(lines=tuple(sources)),))
    rejected = [f"{place_of(row)} ({name}): {row.reason}" for name, side in sides for row in side.rejected]
    if rejected:
        yield _fold(plural(len(rejected), "rejected row"), rejected)
    unread = [
        f"{field.place} {field.name} ({name}): {field.count:,}" for name, side in sides for field in side.unread_fields
    ]
    if unread:
        yield _fold("Fields that are not read", unread)
    left_out = [f"{file} ({name})" for name, side in sides for file in side.files_left_out]
    if left_out:
        yield _fold("Files that are not read", left_out)
    overlap = [f"{place_of(pair.eval)} = {', '.join(map(place_of, pair.train))}" for pair in record.overlap]
    if overlap:
        yield _fold(f"{plural(len(overlap), f'held-out {files.task.example}')} also in the training data", overlap)


_Cell = Callable[[SideReport], str]
_ROWS: tuple[tuple[str, _Cell], ...] = (
    ("rows read", lambda side: f"{side.rows:,}"),
    ("conversations", lambda side: f"{side.conversations:,}"),
    ("turns", lambda side: f"{side.turns:,}"),
    ("tokens", lambda side: f"{side.tokens:,}"),
    ("trained tokens", lambda side: f"{side.supervised_tokens:,} ({side.supervised_share:.0%})"),
    ("median length, tokens", lambda side: f"{side.length.p50:,}"),
    ("95th percentile", lambda side: f"{side.length.p95:,}"),
    ("longest", lambda side: f"{side.length.max:,}"),
    ("truncated", lambda side: f"{side.truncated:,}"),
    ("dropped for length", lambda side: f"{side.dropped:,}"),
    ("rejected rows", lambda side: f"{side.num_rejected:,}"),
    ("exact duplicates", lambda side: f"{side.duplicates:,}"),
)
_OF_CONVERSATIONS = ("turns", "trained tokens")


def _counts(record: DataRecord, sides: list[tuple[str, SideReport]], example: str) -> Table:
    labels = record.labels or ()
    left_out = _OF_CONVERSATIONS if labels else ()
    rows = [
        (f"{example}s" if label == "conversations" else label, *(cell(side) for _, side in sides))
        for label, cell in _ROWS
        if label not in left_out
    ]
    rows += [(f"class {name}", *(f"{(side.labels or {})[name]:,}" for _, side in sides)) for name in labels]
    return Table(
        caption="Rows read and examples made",
        columns=("", *(name for name, _ in sides)),
        rows=tuple(rows),
        numeric=True,
    )


def _length_chart(name: str, side: SideReport, example: str) -> Iterator[Chart]:
    length, histogram = side.length, side.length.histogram
    if histogram is None:
        return
    yield Chart(
        title=f"Length, {name}",
        svg=draw_histogram(
            f"Histogram of the lengths of {plural(side.conversations, example)}: median {length.p50} tokens, 95 % up "
            f"to {length.p95}, longest {length.max}.",
            histogram.edges,
            histogram.counts,
            x_label=f"tokens per {example}",
            y_label=f"{example}s",
        ),
    )


def _source(name: str, source: SourceRead | SplitOff, example: str) -> str:
    if isinstance(source, SplitOff):
        return f"{name}: {source.held_out:.0%} of the training {example}s, drawn with seed {source.seed}"
    digests = ", ".join(f"{last_part(file)} {digest}" for file, digest in source.sha256.items()) or "not available"
    return f"{name}: {source.name}, {plural(source.rows, 'row')}, format {source.format}; SHA-256 {digests}"


def _fold(title: str, lines: list[str]) -> Fold:
    more = len(lines) - _MAX_LINES
    shown = (*lines[:_MAX_LINES], *((f"{more:,} more in data.json",) if more > 0 else ()))
    return Fold(title=title, blocks=(Items(lines=shown),))
