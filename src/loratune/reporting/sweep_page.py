"""A sweep → the sections of its page, and its tables for a terminal."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table as TerminalTable

from loratune.reporting.blocks import Block, Chart, Charts, Code, Items, Page, PageSection, Paragraph, Table
from loratune.reporting.charts import Series, describe_series, draw_lines
from loratune.reporting.units import as_duration, as_number, as_path
from loratune.run.errors import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loratune.run.records.sweep import SweepRecord, TrialResult

MAX_CURVES = 16
"""Curves of one chart: the best trials, since more than that cannot be told apart by color and dashes."""


def sweep_page(record: SweepRecord) -> Page:
    """Return the page of a sweep."""
    sections = (
        ("result", "Result", _result(record)),
        ("settings", "What matters", _settings(record)),
        ("curves", "Curves", _curves(record)),
        ("next", "Next", _next(record)),
    )
    return Page(
        title=f"Sweep of {plural(len(record.trials), 'trial')}",
        lead=record.sentences[0] if record.sentences else "",
        badge=record.state,
        sections=tuple(
            PageSection(name=name, title=title, blocks=found)
            for name, title, blocks in sections
            if (found := tuple(blocks))
        ),
        footer=f"Read from {as_path(record.folder)}.",
    )


def trial_table(record: SweepRecord) -> TerminalTable:
    """Return the ranked trials as a table for a terminal."""
    table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(_columns(record)):
        table.add_column(name, overflow="fold", justify="left" if number <= len(_varied(record)) else "right")
    for row in _rows(record):
        table.add_row(*map(escape, row))
    return table


def _varied(record: SweepRecord) -> list[str]:
    return list(record.trials[0].settings)


def _columns(record: SweepRecord) -> tuple[str, ...]:
    fields = [name.rpartition(".")[2] for name in _varied(record)]
    names = fields if len(set(fields)) == len(fields) else _varied(record)
    return ("trial", *names, "state", "step", "held-out loss", "worse than the best by")


def _rows(record: SweepRecord) -> Iterator[tuple[str, ...]]:
    for trial in record.trials:
        last = trial.rungs[-1] if trial.rungs else None
        yield (
            str(trial.number),
            *(trial.settings[name] for name in _varied(record)),
            trial.state,
            f"{last.step:,}" if last is not None else "–",
            as_number(last.nll) if last is not None else "–",
            _difference(trial),
        )


def _difference(trial: TrialResult) -> str:
    found = trial.to_best
    if found is None:
        return "best" if trial.rungs and not trial.problem else "–"
    half = (found.high - found.low) / 2
    words = f"{as_number(found.value, '+')} ± {half:.2g}"
    words += ", cannot be told apart" if found.low <= 0 <= found.high else ""
    return words if found.step == trial.rungs[-1].step else f"{words} (step {found.step})"


def _result(record: SweepRecord) -> Iterator[Block]:
    yield Items(lines=record.sentences)
    yield Table(caption="Trials, the best first", columns=_columns(record), rows=tuple(_rows(record)), numeric=True)
    yield Paragraph(
        text=f"Losses are nats per trained token of {plural(record.num_examples, 'held-out row')}. A trial is compared "
        "with the best one on the same rows, at the step it was taken to; all intervals together hold with 95 % "
        f"({record.level:.1%} each, paired bootstrap over rows). They say nothing about other seeds.",
        tone="note",
    )
    problems = tuple(f"Trial {trial.number}: {trial.problem}." for trial in record.trials if trial.problem)
    if problems:
        yield Items(lines=problems)


def _settings(record: SweepRecord) -> Iterator[Block]:
    if not record.sensitivity:
        return
    yield Table(
        caption="Mean held-out loss at the first rung, which all trials reached, by setting",
        columns=("setting", "values", "spread"),
        rows=tuple(
            (
                effect.setting,
                "\n".join(f"{value.value}: {as_number(value.nll)}" for value in effect.values),
                as_number(effect.spread),
            )
            for effect in record.sensitivity
        ),
        numeric=True,
    )
    charts = tuple(chart for name in _varied(record) for chart in _setting_chart(record, name))
    if charts:
        yield Charts(charts=charts)


def _setting_chart(record: SweepRecord, name: str) -> Iterator[Chart]:
    """Draw the losses at the first rung over a setting with at least three different numbers."""
    points = []
    for trial in record.trials:
        try:
            value = float(trial.settings[name])
        except ValueError:
            return
        if trial.rungs and value > 0:
            points.append((math.log10(value), trial.rungs[0].nll))
    if len({x for x, _ in points}) < 3:
        return
    points.sort()
    ys = [y for _, y in points]
    svg = draw_lines(
        describe_series(f"Held-out loss at the first rung, by {name}", ys),
        [Series(x=[x for x, _ in points], y=ys, form="points")],
        x_label=f"log10 of {name}",
        y_label="nats",
        log=min(ys) > 0 and max(ys) > 10 * min(ys),
    )
    yield Chart(title=name, svg=svg)


def _curves(record: SweepRecord) -> Iterator[Block]:
    trials = [trial for trial in record.trials if len(trial.rungs) > 1][:MAX_CURVES]
    if not trials:
        return
    series = [
        Series(x=[rung.step for rung in trial.rungs], y=[rung.nll for rung in trial.rungs], color=number)
        for number, trial in enumerate(trials)
    ]
    values = [value for curve in series for value in curve.y]
    alt = " ".join(describe_series(f"Trial {trial.number}", s.y) for trial, s in zip(trials, series, strict=True))
    svg = draw_lines(
        alt,
        series,
        x_label="optimizer steps",
        y_label="nats",
        log=min(values) > 0 and max(values) > 10 * min(values),
    )
    legend = tuple((number, _label(trial)) for number, trial in enumerate(trials))
    yield Chart(title="Held-out loss of the trials that continued", svg=svg, legend=legend)
    seconds = math.fsum(rung.seconds for trial in record.trials for rung in trial.rungs)
    yield Paragraph(text=f"All trials together took {as_duration(seconds)}.")


def _label(trial: TrialResult) -> str:
    return f"{trial.number}: {', '.join(trial.settings.values())}"


def _next(record: SweepRecord) -> Iterator[Block]:
    best = next((trial for trial in record.trials if trial.number == record.best), None)
    if best is not None:
        yield Code(title="Commands", text="\n".join(next_lines(record, best)))


def next_lines(record: SweepRecord, best: TrialResult) -> Sequence[str]:
    """Return the commands that use the best settings."""
    first = ["report" if best.state == "finished" else "resume", best.run]
    return tuple(shlex.join(["loratune", *words]) for words in (first, ["train", str(record.recipe)]))
