"""Base against tuned: the section of a run's page that people read first."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.data.rows.sources import short_names
from loratune.reporting.blocks import Block, Chart, Charts, Paragraph, Table
from loratune.reporting.charts import Bar, draw_bars
from loratune.reporting.run_files import RunFiles
from loratune.reporting.units import as_difference, as_measure, as_number, is_graded, measure_in_words
from loratune.run.directory import Record
from loratune.run.errors import plural

_AXES = {"bleu": "BLEU, more is better", "accuracy": "% of texts, more is better", "f1": "%, more is better"}


_WORDS = {"nll": "loss, nats per token", "perplexity": "perplexity"}


def result(files: RunFiles) -> Iterator[Block]:
    """The measures, their intervals, and what was held to a threshold."""
    record = files.evaluation
    if not record:
        return
    metric, level = record["metric"], f"{record['interval']['level']:.0%}"
    measures = [name for name in dict.fromkeys((metric, "f1", "nll", "perplexity")) if name in record["tuned"]]
    yield Paragraph(
        text=f"Measured on {plural(record['num_examples'], f'held-out {files.example}')} that training did not see. The "
        f"interval says where the difference lies with {level} confidence ({record['interval']['method']}, "
        f"{record['interval']['resamples']:,} resamples).{_of_which(record)}"
    )
    yield Table(
        caption="Base against tuned",
        columns=("measure", "base", "tuned", f"difference, {level} interval"),
        rows=tuple(_measure_row(record, name) for name in measures),
        numeric=True,
    )
    if "sources" in record:
        yield _by_source(record["sources"])
    yield Charts(charts=tuple(_measure_chart(record, name, files.nats) for name in measures if name != "perplexity"))
    if record["items"] and not is_graded(metric):
        yield _turned(record)
    if "confusion" in record:
        yield from class_blocks(record)
    yield from _elsewhere(record)
    if record.get("gates"):
        yield _gates(record["gates"])


def _of_which(record: Record) -> str:
    """Where the adapter is not simply that of the last step."""
    adapter = record.get("adapter", {"kind": "last"})
    if adapter["kind"] == "best":
        return f" The adapter is that of step {adapter['steps'][0]:,}, which had the lowest held-out loss."
    if adapter["kind"] == "mean":
        return f" The adapter is the mean of those after steps {', '.join(f'{step:,}' for step in adapter['steps'])}."
    return ""


def _measure_row(record: Record, name: str) -> tuple[str, ...]:
    difference = record["difference"][name]
    classifies = "confusion" in record
    unit, answers = (
        (", nats per text", "") if classifies else (", nats per token", f", {plural(len(record['items']), 'answer')}")
    )
    of_what = {"nll": unit, record["metric"]: answers}.get(name, "")
    low, high = (as_difference(name, difference[end]).removesuffix(" points") for end in ("low", "high"))
    return (
        f"{measure_in_words(name)}{of_what}",
        as_measure(name, record["base"][name]),
        as_measure(name, record["tuned"][name]),
        f"{as_difference(name, difference['value'])}\n{low} to {high}",
    )


def _by_source(sources: dict[str, Record]) -> Table:
    labels = short_names(sources)
    return Table(
        caption="The loss by source, nats per token",
        columns=("source", "base", "tuned", "difference, interval"),
        rows=tuple(
            _number_row(
                f"{labels[name]}, {plural(part['num_examples'], 'conversation')}",
                {side: part[side]["nll"] for side in ("base", "tuned", "difference")},
            )
            for name, part in sources.items()
        ),
        numeric=True,
    )


def _measure_chart(record: Record, name: str, nats: str) -> Chart:
    base, tuned, difference = record["base"][name], record["tuned"][name], record["difference"][name]
    scale = 1 if name in ("nll", "bleu") else 100
    interval = (scale * max(0.0, base + difference["low"]), scale * (base + difference["high"]))
    words = measure_in_words(name)
    return Chart(
        title=words[0].upper() + words[1:],
        svg=draw_bars(
            f"measure-{name if name in ('nll', 'f1') else 'score'}",
            f"{words}: base {as_measure(name, base)}, tuned {as_measure(name, tuned)}.",
            (
                Bar(name="base", parts=((scale * base, 3),), label=as_measure(name, base)),
                Bar(name="tuned", parts=((scale * tuned, 0),), label=as_measure(name, tuned), interval=interval),
            ),
            x_label=f"{nats}, less is better" if name == "nll" else _AXES.get(name, "% of answers, more is better"),
            ticks=None if name == "nll" else (0, 25, 50, 75, 100),
        ),
        caption="The line on the tuned bar is the interval of the difference, added to the base.",
    )


def _turned(record: Record) -> Table:
    """How many answers became right and how many wrong."""
    scores = [(bool(item["base"]["score"]), bool(item["tuned"]["score"])) for item in record["items"]]
    return Table(
        caption="Answers, base against tuned",
        columns=("", "tuned right", "tuned wrong"),
        rows=(
            ("base right", f"{scores.count((True, True)):,}", f"{scores.count((True, False)):,}"),
            ("base wrong", f"{scores.count((False, True)):,}", f"{scores.count((False, False)):,}"),
        ),
        numeric=True,
    )


def _elsewhere(record: Record) -> Iterator[Block]:
    """What became of everything that was not trained: data of another kind, tasks of the harness."""
    rows = []
    if "forgetting" in record:
        other = record["forgetting"]
        for name in ("nll", "perplexity"):
            of_what = f"{_WORDS[name]}, {plural(other['num_examples'], 'conversation')} of another kind"
            rows.append(_number_row(of_what, {side: other[side][name] for side in ("base", "tuned", "difference")}))
    for task, measures in record.get("harness", {}).get("tasks", {}).items():
        rows += [_number_row(f"{task}: {measure}", values) for measure, values in measures.items()]
    if not rows:
        return
    asked = "asked in the chat template" if record.get("harness", {}).get("chat_template") else "asked as plain text"
    by = f" Tasks by lm-evaluation-harness {record['harness']['version']}, {asked}." if "harness" in record else ""
    yield Paragraph(text=f"Training should leave other things as they were: a loss that rises here is forgetting.{by}")
    yield Table(
        caption="On other data",
        columns=("measure", "base", "tuned", "difference, interval"),
        rows=tuple(rows),
        numeric=True,
    )


def _number_row(name: str, values: Record) -> tuple[str, ...]:
    difference = values["difference"]
    interval = (
        f"\n{as_number(difference['low'], '+')} to {as_number(difference['high'], '+')}" if "low" in difference else ""
    )
    return (
        name,
        as_number(values["base"]),
        as_number(values["tuned"]),
        f"{as_number(difference['value'], '+')}{interval}",
    )


def _gates(gates: list[Record]) -> Table:
    return Table(
        caption="Gates",
        columns=("gate", "measured", ""),
        rows=tuple(
            (gate["gate"], as_number(gate["value"]), "passed" if gate["passed"] else "failed") for gate in gates
        ),
        numeric=True,
    )


MOST_CLASSES = 20
"""Of a confusion matrix on a page."""


def class_blocks(record: Record) -> Iterator[Block]:
    """Of an evaluation with a confusion matrix."""
    majority, names = record["majority"], record["confusion"]["labels"]
    yield Paragraph(
        text=f"Mind what the base is: {record['note']}. Naming {majority['label']} for every text is right for "
        f"{majority['accuracy']:.1%}, with an F1 of {majority['f1']:.1%}."
    )
    yield Table(
        caption="Each class, tuned",
        columns=("class", "held-out texts", "precision", "recall", "F1"),
        rows=tuple(
            (
                part["label"],
                f"{part['num_examples']:,}",
                *(_share(part[name]) for name in ("precision", "recall", "f1")),
            )
            for part in record["classes"]
        ),
        numeric=True,
    )
    if len(names) > MOST_CLASSES:
        yield Paragraph(text=f"evaluation.json has the confusion matrix of the {len(names)} classes.", tone="note")
        return
    for side in ("tuned", "base"):
        yield Table(
            caption=f"Confusion, {side}: true classes (rows), and how often each class was named",
            columns=("", *names),
            rows=tuple(
                (name, *(f"{count:,}" for count in row))
                for name, row in zip(names, record["confusion"][side], strict=True)
            ),
            numeric=True,
        )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
