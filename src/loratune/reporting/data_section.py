"""The section on the data of a run: what was read, what it became, and how long it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loratune.reporting.blocks import Block, Chart, Charts, Fold, Items, Paragraph, Table
from loratune.reporting.charts import draw_histogram
from loratune.reporting.run_files import RunFiles
from loratune.reporting.samples_section import place, short
from loratune.run.directory import Record
from loratune.run.errors import plural

_MOST_LINES = 20


def data(files: RunFiles) -> Iterator[Block]:
    if not files.data:
        return
    sides = [(name, files.data[key]) for key, name in (("train", "training"), ("eval", "held out")) if files.data[key]]
    labels = files.data.get("labels", ())
    left_out = ("turns", "tokens that carry loss") if labels else ()
    if files.data["notices"]:
        yield Items(lines=tuple(files.data["notices"]))
    yield Table(
        caption="What was read, and what it became",
        columns=("", *(name for name, _ in sides)),
        rows=(
            *(
                (f"{files.example}s" if label == "conversations" else label, *(value(side) for _, side in sides))
                for label, value in _DATA_ROWS
                if label not in left_out
            ),
            *((f"class {name}", *(f"{side['labels'][name]:,}" for _, side in sides)) for name in labels),
        ),
        numeric=True,
    )
    yield Paragraph(
        text=f"Which tokens carry loss was worked out in two independent ways, which agree ({files.data['mask']['method']})."
        if files.data["mask"]["verified"]
        else f"Which tokens carry loss: {files.data['mask']['method']}."
    )
    charts = [_length_chart(name, side, files.example) for name, side in sides if "histogram" in side["length"]]
    if charts:
        yield Charts(charts=tuple(charts))
    sources = [(name, source) for name, side in sides for source in side["sources"]]
    yield Fold(
        title="Sources", blocks=(Items(lines=tuple(_source(name, source, files.example) for name, source in sources)),)
    )
    rejected = [(name, row) for name, side in sides for row in side["rejected"]]
    if rejected:
        lines = [f"{place(row)} ({name}): {row['reason']}" for name, row in rejected]
        yield Fold(title=f"{plural(len(lines), 'row')} left out", blocks=(Items(lines=_first(lines, "data.json")),))
    if files.data["overlap"]:
        lines = [f"{place(pair['eval'])} = {', '.join(map(place, pair['train']))}" for pair in files.data["overlap"]]
        yield Fold(
            title=f"{plural(len(lines), f'held-out {files.example}')} also in the training data",
            blocks=(Items(lines=_first(lines, "data.json")),),
        )


_DATA_ROWS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("rows read", lambda side: f"{side['rows']:,}"),
    ("conversations", lambda side: f"{side['conversations']:,}"),
    ("turns", lambda side: f"{side['turns']:,}"),
    ("tokens", lambda side: f"{side['tokens']:,}"),
    ("tokens that carry loss", lambda side: f"{side['supervised_tokens']:,} ({side['supervised_share']:.0%})"),
    ("tokens of one, median", lambda side: f"{side['length']['p50']:,}"),
    ("95 % are no longer than", lambda side: f"{side['length']['p95']:,}"),
    ("longest", lambda side: f"{side['length']['max']:,}"),
    ("cut for length", lambda side: f"{side['truncated']:,}"),
    ("left out for length", lambda side: f"{side['dropped']:,}"),
    ("left out as wrong", lambda side: f"{side['num_rejected']:,}"),
    ("exact duplicates", lambda side: f"{side['duplicates']:,}"),
)


def _length_chart(name: str, side: Record, example: str) -> Chart:
    histogram, length = side["length"]["histogram"], side["length"]
    return Chart(
        title=f"Length, {name}",
        svg=draw_histogram(
            f"length-{name.replace(' ', '-')}",
            f"Histogram of the lengths of {plural(side['conversations'], example)}: median {length['p50']} "
            f"tokens, 95 % up to {length['p95']}, longest {length['max']}.",
            histogram["edges"],
            histogram["counts"],
            x_label=f"tokens of a {example}",
            y_label=f"{example}s",
        ),
    )


def _source(name: str, source: Record, example: str) -> str:
    if "held_out" in source:
        return f"{name}: {source['held_out']:.0%} of the training {example}s, drawn with seed {source['seed']}"
    digests = source["sha256"]
    hashes = ", ".join(f"{short(file)} {digest}" for file, digest in digests.items()) if digests else "no fingerprint"
    return f"{name}: {source['name']}, {plural(source['rows'], 'row')}, format {source['format']}; SHA-256 {hashes}"


def _first(lines: list[str], file: str) -> tuple[str, ...]:
    more = len(lines) - _MOST_LINES
    return (*lines[:_MOST_LINES], *((f"{more:,} more in {file}",) if more > 0 else ()))
