"""Several runs → the sections of one page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import accumulate

from loratune.reporting.blocks import Answer, Block, Chart, Charts, Page, Paragraph, Sample, Table, build_sections
from loratune.reporting.charts import Series, describe, draw_lines
from loratune.reporting.run_files import RunFiles
from loratune.reporting.samples_section import answer, cut, place, short
from loratune.reporting.units import as_bytes, as_difference, as_duration, as_measure, is_graded, measure_in_words
from loratune.reporting.word_diff import whole
from loratune.run.directory import Record
from loratune.run.errors import plural

MOST_SAMPLES = 20
_NOT_SETTINGS = ("train.output_dir",)

Runs = Sequence[RunFiles]


def comparison_page(runs: Runs) -> Page:
    """What differs between runs, in settings and in results. What cannot be told is said on the page."""
    complaints = [f"{name}: {text}" for name, run in zip(names(runs), runs, strict=True) for text in run.complaints]
    return Page(
        title=f"{len(runs)} runs compared",
        lead=", ".join(names(runs)),
        sections=build_sections(_PARTS, runs, complaints),
        footer=f"Read at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {', '.join(str(run.run.root) for run in runs)}.",
    )


def names(runs: Runs) -> list[str]:
    """The folder of each run; the whole path where two folders have one name."""
    folders = [run.name for run in runs]
    return [name if folders.count(name) == 1 else str(run.run.root) for name, run in zip(folders, runs, strict=True)]


# ---- results


def _results(runs: Runs) -> Iterator[Block]:
    records = [run.evaluation for run in runs]
    found = dict.fromkeys(name for record in records for name in record.get("tuned", {}))
    measures = sorted(found, key=("nll", "perplexity").count)
    if not measures:
        return
    if len({_input(run, "eval") for run in runs if run.evaluation}) > 1:
        yield Paragraph(
            text="The runs were measured on different held-out data: their results cannot be compared.", tone="warning"
        )
    yield Table(
        caption="Tuned, with its difference to the base and the interval of that difference",
        columns=("measure", *names(runs)),
        rows=tuple((measure_in_words(name), *(_result(record, name) for record in records)) for name in measures),
        numeric=True,
    )


def _result(record: Record, name: str) -> str:
    if name not in record.get("tuned", {}):
        return "–"
    difference = record["difference"][name]
    low, high = (as_difference(name, difference[end]).removesuffix(" points") for end in ("low", "high"))
    tuned = as_measure(name, record["tuned"][name])
    return f"{tuned}\n{as_difference(name, difference['value'])}\n{low} to {high}"


# ---- what it cost


def _cost(runs: Runs) -> Iterator[Block]:
    columns = [_costs(run) for run in runs]
    rows = tuple((label, *(column[label] for column in columns)) for label in columns[0])
    yield Table(caption="What each run cost", columns=("", *names(runs)), rows=rows, numeric=True)


def _costs(run: RunFiles) -> dict[str, str]:
    measured, parameters = run.plan.get("measured", {}), run.plan.get("parameters", {})
    seconds = run.train_seconds
    return {
        "state": run.state,
        "trained parameters": f"{parameters['trainable']:,}" if parameters else "–",
        "adapter file": as_bytes(parameters["adapter_bytes"]) if parameters else "–",
        "steps": f"{len(run.steps):,}",
        "tokens trained": f"{run.num_tokens:,}",
        "time in steps": as_duration(seconds),
        "tokens per second": f"{run.num_tokens / seconds:,.0f}" if seconds else "–",
        "peak memory": as_bytes(measured["peak_bytes"]) if measured else "–",
    }


# ---- settings


def _settings(runs: Runs) -> Iterator[Block]:
    columns = [dict(_flat(_effective(run))) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = tuple(
        (key, *(column.get(key, "–") for column in columns))
        for key in keys
        if key not in _NOT_SETTINGS and len({column.get(key) for column in columns}) > 1
    )
    if not rows:
        yield Paragraph(text="Nothing: settings, inputs, versions and machine are the same.")
        return
    yield Table(
        caption="Settings, inputs (by the first letters of their SHA-256), versions and machine that are not the same",
        columns=("", *names(runs)),
        rows=rows,
    )


def _effective(run: RunFiles) -> Record:
    lock = run.lock
    fingerprints = {
        key: {name: digest[:12] for name, digest in value.items()} if isinstance(value, dict) else value[:12]
        for key, value in lock.get("inputs", {}).items()
        if key in ("model", "template", "train", "eval")
    }
    return {
        **lock.get("recipe", {}),
        "input": fingerprints,
        "version": lock.get("versions", {}),
        "machine": lock.get("machine", {}),
    }


def _flat(record: Record, before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, list) and all(isinstance(part, dict) and "name" in part for part in value):
            yield f"{before}{key}", ", ".join(part["name"] for part in value)
        else:
            yield f"{before}{key}", str(value)


def _input(run: RunFiles, key: str) -> str:
    """The fingerprint of an input, as text; empty where the run has none."""
    return json.dumps(run.lock.get("inputs", {}).get(key, ""), sort_keys=True)


# ---- curves


def _curves(runs: Runs) -> Iterator[Block]:
    legend = tuple(enumerate(names(runs)))
    charts = []
    for key, title, unit in (
        ("loss", "Training loss", " or ".join(dict.fromkeys(run.nats for run in runs))),
        ("eval_nll", "Held-out loss", " or ".join(dict.fromkeys(run.nats for run in runs))),
        ("learning_rate", "Learning rate", ""),
        ("tokens_per_second", "Speed", "tokens per second"),
    ):
        curves = [curve for number, run in enumerate(runs) if (curve := _curve(run, key, number)).x]
        if not curves:
            continue
        values = [value for curve in curves for value in curve.y]
        log = unit.startswith("nats") and min(values) > 0 and max(values) > 10 * min(values)
        alt = " ".join(describe(f"{title} of {names(runs)[curve.colour]}", curve.y) for curve in curves)
        svg = draw_lines(
            f"compare-{key.replace('_', '-')}",
            alt,
            curves,
            x_label="tokens trained",
            y_label=unit,
            log=log,
            from_zero=not unit.startswith("nats"),
        )
        charts.append(Chart(title=title, svg=svg, legend=legend))
    if charts:
        yield Paragraph(
            text="Over the tokens trained, since the steps of two runs may differ in size. Held-out loss at 0 is the base's."
        )
        yield Charts(charts=tuple(charts))


def _curve(run: RunFiles, key: str, number: int) -> Series:
    sums = accumulate(step["num_tokens"] for step in run.steps)
    trained = {step["step"]: total for step, total in zip(run.steps, sums, strict=True)}
    if key != "eval_nll":
        points = [(trained[step["step"]], step[key]) for step in run.steps if key in step]
        return Series(x=[x for x, _ in points], y=[y for _, y in points], colour=number)
    points = [(trained[line["step"]], line[key]) for line in run.held_out if line["step"] in trained]
    if run.evaluation:
        points.insert(0, (0, run.evaluation["base"]["nll"]))
    return Series(x=[x for x, _ in points], y=[y for _, y in points], colour=number, form="points")


# ---- answers that differ


def _answers(runs: Runs) -> Iterator[Block]:
    if any(is_graded(run.evaluation.get("metric", "none")) for run in runs):
        return
    items = [{_key(item): item for item in run.evaluation.get("items", [])} for run in runs]
    common = [key for key in items[0] if all(key in other for other in items[1:])]
    if not common:
        return
    split = [key for key in common if len({bool(column[key]["tuned"]["score"]) for column in items}) > 1]
    classifies = runs[0].classifies
    yield Paragraph(
        text=f"Of {plural(len(common), 'text' if classifies else 'prompt')} that all runs answered, {len(split):,} were answered right by some and wrong "
        f"by others{f'; the first {MOST_SAMPLES} of them' if len(split) > MOST_SAMPLES else ''}."
    )
    for key in split[:MOST_SAMPLES]:
        first = items[0][key]
        reference = cut(first["reference"])
        answers = (
            answer(name, column[key]["tuned"], reference) for name, column in zip(names(runs), items, strict=True)
        )
        yield Sample(
            title=place(first),
            prompt=cut(first["question"]),
            asked="text" if classifies else "prompt",
            answers=(Answer(title="class" if classifies else "reference", pieces=whole(reference)), *answers),
        )


def _key(item: Record) -> tuple[str, str, str]:
    """Equal for the same question about the same row."""
    return (f"{short(item['file'])}:{item['line']}", item["prompt"], item["reference"])


_PARTS: tuple[tuple[str, str, Callable[[Runs], Iterator[Block]]], ...] = (
    ("results", "Results", _results),
    ("curves", "Curves", _curves),
    ("settings", "What differs", _settings),
    ("cost", "What it cost", _cost),
    ("answers", "Answers that differ", _answers),
)
