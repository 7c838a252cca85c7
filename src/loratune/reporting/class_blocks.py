"""What only classifiers have on a page: the majority class, each class by itself, and which was taken for which."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.reporting.blocks import Block, Paragraph, Table
from loratune.run import Record

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
