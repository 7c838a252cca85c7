"""Several runs → the sections of one page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from loratune.reporting.blocks import AnswerText, Block, Chart, Charts, Page, Paragraph, Sample, Table, build_sections
from loratune.reporting.charts import Series, describe_series, draw_lines
from loratune.reporting.run_files import RunFiles
from loratune.reporting.samples_section import answer_block, last_part, place_of, shorten
from loratune.reporting.units import (
    as_bytes,
    as_difference,
    as_duration,
    as_interval,
    as_measure,
    as_path,
    is_marked,
    measure_in_words,
)
from loratune.reporting.word_diff import unmarked
from loratune.run.errors import plural

if TYPE_CHECKING:
    from loratune.run.records.evaluation import EvaluationRecord, Item
    from loratune.run.records.metrics import StepLine

MAX_SAMPLES = 20
MAX_RUNS_ACROSS = 4
"""With more runs, a run is a row of each table; with fewer, a column."""
_NOT_SETTINGS = ("train.output_dir",)

Runs = Sequence[RunFiles]


def comparison_page(runs: Runs) -> Page:
    """Return how runs differ, in settings and in results. What is missing or damaged is named on the page."""
    complaints = [f"{name}: {text}" for name, run in zip(names(runs), runs, strict=True) for text in run.complaints]
    folders = ", ".join(as_path(run.run.root) for run in runs)
    return Page(
        title=f"{len(runs)} runs compared",
        lead=", ".join(names(runs)),
        sections=build_sections(_PARTS, runs, complaints),
        footer=f"Read at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {folders}.",
    )


def names(runs: Runs) -> list[str]:
    """Return the name of each run's folder, or its full path if two folders have the same name."""
    folders = [run.name for run in runs]
    return [name if folders.count(name) == 1 else str(run.run.root) for name, run in zip(folders, runs, strict=True)]


def _table(caption: str, runs: Runs, rows: Sequence[tuple[str, ...]], *, numeric: bool) -> Table:
    """Return a table of label × runs, turned so that many runs stand below each other: a page grows downwards."""
    grid = [("", *names(runs)), *rows]
    if len(runs) > MAX_RUNS_ACROSS and len(runs) >= len(rows):
        grid = [("run", *(row[0] for row in rows)), *list(zip(*grid, strict=True))[1:]]
    return Table(caption=caption, columns=grid[0], rows=tuple(grid[1:]), numeric=numeric)


# ---- results


def _results(runs: Runs) -> Iterator[Block]:
    records = [run.evaluation for run in runs]
    found = dict.fromkeys(name for record in records if record is not None for name in record.tuned)
    measures = sorted(found, key=("nll", "perplexity").count)
    if not measures:
        return
    if len({_held_out_fingerprint(run) for run in runs if run.evaluation is not None}) > 1:
        yield Paragraph(
            text="The runs were evaluated on different held-out data, so their results cannot be compared.",
            tone="warning",
        )
    rows = [(measure_in_words(name), *_result_row(records, name)) for name in measures]
    yield _table("Fine-tuned; difference to base; interval of the difference", runs, rows, numeric=True)


def _result_row(records: Sequence[EvaluationRecord | None], name: str) -> Iterator[str]:
    """Yield the cell of each run; the best one says so."""
    values = [record.tuned[name] for record in records if record is not None and name in record.tuned]
    best = (min if name in ("nll", "perplexity") else max)(values)
    for record in records:
        cell = _result(record, name)
        is_best = record is not None and record.tuned.get(name) == best and len(set(values)) > 1
        yield f"{cell}\nbest" if is_best else cell


def _result(record: EvaluationRecord | None, name: str) -> str:
    if record is None or name not in record.tuned:
        return "–"
    difference = record.difference[name]
    values = (as_measure(name, record.tuned[name]), as_difference(name, difference.value))
    return "\n".join((*values, as_interval(name, difference)))


def _held_out_fingerprint(run: RunFiles) -> str:
    return "" if run.lock is None else run.lock.inputs.eval.model_dump_json(exclude_unset=True)


# ---- cost


def _cost(runs: Runs) -> Iterator[Block]:
    columns = [_costs(run) for run in runs]
    rows = [(label, *(column[label] for column in columns)) for label in columns[0]]
    yield _table("Time, memory and size", runs, rows, numeric=True)


def _costs(run: RunFiles) -> dict[str, str]:
    parameters = run.plan.parameters if run.plan is not None else None
    measured = run.plan.measured if run.plan is not None else None
    seconds = run.train_seconds
    return {
        "state": run.state,
        "trained parameters": f"{parameters.trainable:,}" if parameters is not None else "–",
        "adapter file": as_bytes(parameters.adapter_bytes) if parameters is not None else "–",
        "steps": f"{len(run.steps):,}",
        "tokens processed": f"{run.num_tokens:,}",
        "training time": as_duration(seconds),
        "tokens per second": f"{run.num_tokens / seconds:,.0f}" if seconds else "–",
        "peak memory": as_bytes(measured.peak_bytes) if measured is not None else "–",
    }


# ---- settings


def _settings(runs: Runs) -> Iterator[Block]:
    columns = [dict(_flat(_effective(run))) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [
        (key, *(column.get(key, "–") for column in columns))
        for key in keys
        if key not in _NOT_SETTINGS and len({column.get(key) for column in columns}) > 1
    ]
    if not rows:
        yield Paragraph(text="Settings, inputs, versions and machine are the same.")
        return
    caption = "Settings, inputs (first characters of their SHA-256), versions and machine that differ"
    yield _table(caption, runs, rows, numeric=False)


def _effective(run: RunFiles) -> dict[str, Any]:
    lock = run.lock
    if lock is None:
        return {}
    inputs = lock.inputs
    return {
        **lock.recipe,
        "input": {
            "model": _cut(inputs.model),
            "template": inputs.template[:12],
            "train": _cut(inputs.train),
            "eval": _cut(inputs.eval),
        },
        "version": lock.versions,
        "machine": lock.machine.model_dump(),
    }


def _cut(digests: BaseModel | Mapping[str, str]) -> dict[str, str]:
    values = digests.model_dump(exclude_unset=True) if isinstance(digests, BaseModel) else digests
    return {name: str(digest)[:12] for name, digest in values.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(part, dict) and "name" in part for part in value):
            yield f"{prefix}{key}", ", ".join(part["name"] for part in value)
        else:
            yield f"{prefix}{key}", str(value)


# ---- curves

_STEP_CURVES: tuple[tuple[str, str, Callable[[StepLine], float]], ...] = (
    ("Learning rate", "", lambda step: step.learning_rate),
    ("Speed", "tokens per second", lambda step: step.tokens_per_second),
)


def _curves(runs: Runs) -> Iterator[Block]:
    nats = " or ".join(dict.fromkeys(run.task.nats for run in runs))
    losses = [_step_curve(run, number, lambda step: step.loss) for number, run in enumerate(runs)]
    held_out = [_held_out_curve(run, number) for number, run in enumerate(runs)]
    charts = [
        *_chart("Training loss", nats, losses, runs),
        *_chart("Held-out loss", nats, held_out, runs),
    ]
    for title, unit, value_of in _STEP_CURVES:
        curves = [_step_curve(run, number, value_of) for number, run in enumerate(runs)]
        charts += _chart(title, unit, curves, runs)
    if charts:
        yield Paragraph(
            text="Plotted over tokens processed, since steps of different runs may differ in size. The held-out loss "
            "at 0 is that of the model before the run."
        )
        yield Charts(charts=tuple(charts))


def _chart(title: str, unit: str, curves: Sequence[Series], runs: Runs) -> Iterator[Chart]:
    """Draw one curve per run, on a logarithmic axis where losses span a decade."""
    curves = [curve for curve in curves if curve.x]
    if not curves:
        return
    values = [value for curve in curves for value in curve.y]
    is_loss = unit.startswith("nats")
    alt = " ".join(describe_series(f"{title} of {names(runs)[curve.color]}", curve.y) for curve in curves)
    svg = draw_lines(
        alt,
        curves,
        x_label="tokens processed",
        y_label=unit,
        log=is_loss and min(values) > 0 and max(values) > 10 * min(values),
        from_zero=not is_loss,
    )
    yield Chart(title=title, svg=svg, legend=tuple(enumerate(names(runs))))


def _tokens_by_step(run: RunFiles) -> dict[int, int]:
    """Return step → tokens processed up to its end."""
    totals = accumulate(step.num_tokens for step in run.steps)
    return {step.step: total for step, total in zip(run.steps, totals, strict=True)}


def _step_curve(run: RunFiles, number: int, value_of: Callable[[StepLine], float]) -> Series:
    tokens = _tokens_by_step(run)
    return Series(x=[tokens[step.step] for step in run.steps], y=[value_of(step) for step in run.steps], color=number)


def _held_out_curve(run: RunFiles, number: int) -> Series:
    tokens = _tokens_by_step(run)
    points = [(tokens[line.step], line.eval_nll) for line in run.held_out if line.step in tokens]
    if run.evaluation is not None:
        points.insert(0, (0, run.evaluation.base["nll"]))
    return Series(x=[x for x, _ in points], y=[y for _, y in points], color=number, form="points")


# ---- answers that differ


def _answers(runs: Runs) -> Iterator[Block]:
    records = [run.evaluation for run in runs]
    if any(record is not None and not is_marked(record.metric) for record in records):
        return
    items = [{_key(item): item for item in record.items} if record is not None else {} for record in records]
    common = [key for key in items[0] if all(key in other for other in items[1:])]
    if not common:
        return
    split = [key for key in common if len({bool(column[key].tuned.score) for column in items}) > 1]
    task = runs[0].task
    yield Paragraph(
        text=f"Of {plural(len(common), task.prompt)} in all evaluations, {len(split):,} were answered correctly by "
        f"some runs and wrong by others{f'; the first {MAX_SAMPLES} of them' if len(split) > MAX_SAMPLES else ''}."
    )
    for key in split[:MAX_SAMPLES]:
        first = items[0][key]
        reference = shorten(first.reference)
        answers = (
            answer_block(name, column[key].tuned, reference) for name, column in zip(names(runs), items, strict=True)
        )
        yield Sample(
            title=place_of(first),
            prompt=shorten(first.question),
            prompt_label=task.prompt,
            answers=(AnswerText(title=task.reference, pieces=unmarked(reference)), *answers),
        )


def _key(item: Item) -> tuple[str, str, str]:
    """Return a key that is equal for the same question on the same row."""
    return (f"{last_part(item.file)}:{item.line}", item.prompt, item.reference)


_PARTS: tuple[tuple[str, str, Callable[[Runs], Iterator[Block]]], ...] = (
    ("results", "Results", _results),
    ("curves", "Curves", _curves),
    ("settings", "Differences", _settings),
    ("cost", "Time and memory", _cost),
    ("answers", "Answers that differ", _answers),
)
