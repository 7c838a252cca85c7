"""Base vs. fine-tuned: the first section of a run's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.recipe.short_names import short_names
from loratune.reporting.blocks import Block, Chart, Charts, Paragraph, Table
from loratune.reporting.charts import Bar, draw_bars
from loratune.reporting.preference_section import LABEL_MEASURES, PAIR_MEASURES, preference
from loratune.reporting.units import (
    as_difference,
    as_interval,
    as_measure,
    as_number,
    is_marked,
    measure_in_words,
)
from loratune.run.errors import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratune.reporting.run_files import RunFiles
    from loratune.reporting.task import ReportedTask
    from loratune.run.records.evaluation import ComparisonRecord, DifferenceRecord, EvaluationRecord, GateResult

_AXES = {
    "bleu": "BLEU, higher is better",
    "accuracy": "% of texts, higher is better",
    "f1": "%, higher is better",
    **dict.fromkeys(PAIR_MEASURES, "% of pairs, higher is better"),
}
_OTHER_DATA = {"nll": "loss, nats per token", "perplexity": "perplexity"}


def result(files: RunFiles) -> Iterator[Block]:
    """Build the section: measures with their intervals, losses on other data, gates."""
    record = files.evaluation
    if record is None:
        return
    level = f"{record.interval.level:.0%}"
    names = dict.fromkeys((*PAIR_MEASURES, *LABEL_MEASURES, record.metric, "f1", "nll", "perplexity"))
    measures = [name for name in names if name in record.tuned]
    yield Paragraph(
        text=f"Measured on {plural(record.num_examples, f'held-out {files.task.example}')} that were not trained on. "
        f"The interval contains the true difference with {level} confidence ({record.interval.method}, "
        f"{record.interval.resamples:,} resamples).{_which_adapter(record)}"
    )
    yield Table(
        caption=f"{record.side_before.capitalize()} vs. fine-tuned",
        columns=("measure", record.side_before, "fine-tuned", f"difference, {level} interval"),
        rows=tuple(_measure_row(record, name, files.task) for name in measures),
        numeric=True,
    )
    if record.sources is not None:
        yield _by_source(record.sources, record.side_before)
    not_drawn = ("perplexity", "pair_margin", *LABEL_MEASURES)  # bars begin at zero
    drawn = [name for name in measures if name not in not_drawn]
    charts = [_measure_chart(record, name, files.task, level) for name in drawn]
    yield Charts(charts=tuple(charts))
    if record.items and is_marked(record.metric):
        yield _correct_and_wrong(record)
    if record.confusion is not None:
        yield from _classes(record)
    yield from preference(record)
    yield from _other_data(record)
    if record.gates:
        yield _gates(record.gates)


def _which_adapter(record: EvaluationRecord) -> str:
    """Say which adapter was evaluated if it is not that of the last step."""
    steps = record.adapter.steps
    if record.adapter.kind == "best":
        return f" The adapter is that of step {steps[0]:,}, which has the lowest held-out loss."
    if record.adapter.kind == "mean":
        return f" The adapter is the mean of the checkpoints of steps {', '.join(f'{step:,}' for step in steps)}."
    return ""


def _measure_row(record: EvaluationRecord, name: str, task: ReportedTask) -> tuple[str, ...]:
    units = {
        record.metric: f", {plural(len(record.items), 'answer')}" if record.confusion is None else "",
        "nll": f", {task.short_nats}",
    }
    difference = record.difference[name]
    return (
        f"{measure_in_words(name)}{units.get(name, '')}",
        as_measure(name, record.base[name]),
        as_measure(name, record.tuned[name]),
        f"{as_difference(name, difference.value)}\n{as_interval(name, difference)}",
    )


def _by_source(sources: Mapping[str, ComparisonRecord], before: str) -> Table:
    labels = short_names(sources)
    return Table(
        caption="Loss by source, nats per token",
        columns=("source", before, "fine-tuned", "difference, interval"),
        rows=tuple(
            _number_row(
                f"{labels[name]}, {plural(part.num_examples, 'conversation')}",
                part.base["nll"],
                part.tuned["nll"],
                part.difference["nll"],
            )
            for name, part in sources.items()
        ),
        numeric=True,
    )


def _measure_chart(record: EvaluationRecord, name: str, task: ReportedTask, level: str) -> Chart:
    base, tuned, difference = record.base[name], record.tuned[name], record.difference[name]
    scale = 1 if name in ("nll", "bleu") else 100
    assert difference.low is not None
    assert difference.high is not None
    interval = (scale * max(0.0, base + difference.low), scale * (base + difference.high))
    words = measure_in_words(name)
    return Chart(
        title=words[0].upper() + words[1:],
        svg=draw_bars(
            f"{words}: {record.side_before} {as_measure(name, base)}, fine-tuned {as_measure(name, tuned)}.",
            (
                Bar(name=record.side_before, parts=((scale * base, 3),), label=as_measure(name, base)),
                Bar(name="fine-tuned", parts=((scale * tuned, 0),), label=as_measure(name, tuned), interval=interval),
            ),
            x_label=f"{task.nats}, lower is better"
            if name == "nll"
            else _AXES.get(name, "% of answers, higher is better"),
            ticks=None if name == "nll" else (0, 25, 50, 75, 100),
        ),
        caption=f"Error bar: {level} interval (base + difference).",
    )


def _correct_and_wrong(record: EvaluationRecord) -> Table:
    """Count the answers that became correct and those that became wrong."""
    scores = [(bool(item.base.score), bool(item.tuned.score)) for item in record.items]
    return Table(
        caption="Answers, base vs. fine-tuned",
        columns=("", "fine-tuned correct", "fine-tuned wrong"),
        rows=(
            ("base correct", f"{scores.count((True, True)):,}", f"{scores.count((True, False)):,}"),
            ("base wrong", f"{scores.count((False, True)):,}", f"{scores.count((False, False)):,}"),
        ),
        numeric=True,
    )


def _other_data(record: EvaluationRecord) -> Iterator[Block]:
    """Show measures on what was not trained: `evaluate.forgetting` and tasks of lm-evaluation-harness."""
    other, harness = record.forgetting, record.harness
    rows = []
    if other is not None:
        for name, words in _OTHER_DATA.items():
            label = f"{words}, {plural(other.num_examples, 'conversation')} of another kind"
            rows.append(_number_row(label, other.base[name], other.tuned[name], other.difference[name]))
    for task, measures in harness.tasks.items() if harness is not None else ():
        for measure, values in measures.items():
            rows.append(_number_row(f"{task}: {measure}", values.base, values.tuned, values.difference))
    if not rows:
        return
    by = ""
    if harness is not None:
        form = "in the chat template" if harness.chat_template else "as plain text"
        by = f" Tasks by lm-evaluation-harness {harness.version}, asked {form}."
    yield Paragraph(text=f"Fine-tuning should not change these: a loss that rises here means forgetting.{by}")
    yield Table(
        caption="Other data",
        columns=("measure", record.side_before, "fine-tuned", "difference, interval"),
        rows=tuple(rows),
        numeric=True,
    )


def _number_row(label: str, base: float, tuned: float, difference: DifferenceRecord) -> tuple[str, ...]:
    interval = ""
    if difference.low is not None and difference.high is not None:
        interval = f"\n{as_number(difference.low, '+')} to {as_number(difference.high, '+')}"
    return (label, as_number(base), as_number(tuned), f"{as_number(difference.value, '+')}{interval}")


def _gates(gates: tuple[GateResult, ...]) -> Table:
    rows = [(gate.gate, as_number(gate.value), "passed" if gate.passed else "failed") for gate in gates]
    return Table(caption="Gates", columns=("gate", "measured", ""), rows=tuple(rows), numeric=True)


MAX_CLASSES = 20
"""Classes of a confusion matrix that fits on a page."""


def _classes(record: EvaluationRecord) -> Iterator[Block]:
    """Show the majority class, the measures of each class and the confusion matrices."""
    majority, confusion = record.majority, record.confusion
    assert majority is not None
    assert confusion is not None
    yield Paragraph(
        text=f"Note: {record.note}. Predicting {majority.label} for every text has an accuracy of "
        f"{majority.accuracy:.1%} and an F1 of {majority.f1:.1%}."
    )
    yield Table(
        caption="Classes, fine-tuned",
        columns=("class", "held-out texts", "precision", "recall", "F1"),
        rows=tuple(
            (part.label, f"{part.num_examples:,}", _share(part.precision), _share(part.recall), _share(part.f1))
            for part in record.classes or ()
        ),
        numeric=True,
    )
    names = confusion.labels
    if len(names) > MAX_CLASSES:
        yield Paragraph(text=f"evaluation.json has the confusion matrix of the {len(names)} classes.", tone="note")
        return
    for side, matrix in (("fine-tuned", confusion.tuned), (record.side_before, confusion.base)):
        yield Table(
            caption=f"Confusion matrix, {side}: true classes in rows, predicted classes in columns",
            columns=("", *names),
            rows=tuple((name, *(f"{count:,}" for count in counts)) for name, counts in zip(names, matrix, strict=True)),
            numeric=True,
        )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
