"""Answers to held-out prompts side by side, with their differences from the reference marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.reporting.blocks import AnswerText, Block, Fold, Paragraph, Sample
from loratune.reporting.units import is_graded, is_marked
from loratune.reporting.word_diff import mark_differences, unmarked
from loratune.run.errors import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.reporting.run_files import RunFiles
    from loratune.reporting.task import ReportedTask
    from loratune.run.records.base import Place
    from loratune.run.records.evaluation import AnswerRecord, Item
    from loratune.run.records.metrics import SampleAnswer

MAX_SAMPLES = 20
MAX_FAILURES = 100
MAX_TIMES = 8
"""The times, the last ones, of which the answers to a prompt are shown."""
MAX_CHARACTERS = 2000
"""Characters shown of a text; the run's files have all of it."""


def samples(files: RunFiles) -> Iterator[Block]:
    """Build the section of the first held-out prompts with both answers."""
    record = files.evaluation
    if record is None or not record.items:
        return
    shown = record.items[:MAX_SAMPLES]
    marks = (
        " Words that differ from the reference are marked: extra words are underlined, missing ones are struck "
        "through. An answer that has little in common with the reference is left unmarked."
    )
    yield Paragraph(
        text=f"The first {len(shown)} of {plural(len(record.items), f'held-out {files.task.prompt}')}, in the order of "
        "the data (not hand-picked)." + (marks if files.task.marks_differences else "")
    )
    graded = is_graded(record.metric)
    for number, item in enumerate(shown, 1):
        yield _sample(number, item, sides=(record.side_before, "fine-tuned"), graded=graded, task=files.task)


def failures(files: RunFiles) -> Iterator[Block]:
    """Build the section of the prompts that the fine-tuned model answers wrong; regressions come first."""
    record = files.evaluation
    if record is None or not record.items or not is_marked(record.metric):
        return
    wrong = [(number, item) for number, item in enumerate(record.items, 1) if not item.tuned.score]
    if not wrong:
        yield Paragraph(text=f"None: all {plural(len(record.items), 'answer')} are correct.")
        return
    regressions = [pair for pair in wrong if pair[1].base.score]
    yield Paragraph(text=files.task.failures(record, len(regressions), _max_new_tokens(files)))
    ordered = [*regressions, *(pair for pair in wrong if pair not in regressions)]
    for number, item in ordered[:MAX_FAILURES]:
        yield _sample(number, item, sides=("fine-tuned",), task=files.task)
    if len(ordered) > MAX_FAILURES:
        yield Paragraph(text=f"{len(ordered) - MAX_FAILURES:,} more in evaluation.json.", tone="note")


def answers_during_training(files: RunFiles, *, newest_only: bool = False) -> Iterator[Block]:
    """Build the answers that were given during training, by prompt: one for each time (`evaluate.samples_every`).

    Args:
        files: The run.
        newest_only: Whether only the last answers are shown, and the others are folded away.
    """
    for number, first in enumerate(files.samples[-1].answers or () if files.samples else (), 1):
        asked = [
            (line.step, answer)
            for line in files.samples
            for answer in line.answers or ()
            if (answer.question, answer.reference) == (first.question, first.reference)
        ]
        shown = asked[-1:] if newest_only else asked[-MAX_TIMES:]
        reference = shorten(first.reference)
        yield Sample(
            title=f"{number} · " + (f"after step {asked[-1][0]:,}" if newest_only else plural(len(asked), "answer")),
            prompt=shorten(first.question),
            prompt_label=files.task.prompt,
            answers=(
                AnswerText(title=files.task.reference, pieces=unmarked(reference)),
                *(_answer_after(step, answer, reference) for step, answer in shown),
            ),
        )
    if newest_only and len(files.samples) > 1:
        yield Fold(title="Earlier answers", blocks=tuple(answers_during_training(files)))


def _answer_after(step: int, answer: SampleAnswer, reference: str) -> AnswerText:
    text = shorten(answer.text)
    return AnswerText(
        title=f"after step {step:,}",
        pieces=unmarked(text) if text.strip() == reference.strip() else mark_differences(text, reference),
        remarks=() if answer.stopped else ("hit the token limit",),
    )


def _max_new_tokens(files: RunFiles) -> str:
    number = files.lock.recipe.get("evaluate", {}).get("max_new_tokens") if files.lock else None
    return f"{number:,} tokens" if number else "evaluate.max_new_tokens"


def _sample(number: int, item: Item, sides: tuple[str, ...], *, task: ReportedTask, graded: bool = False) -> Sample:
    reference = shorten(item.reference)
    others = (shorten(text) for text in (item.references or ())[1:])
    answers = {"base": item.base, "before": item.base, "fine-tuned": item.tuned}
    return Sample(
        title=f"{number} · {place_of(item)}",
        prompt=shorten(item.question),
        prompt_label=task.prompt,
        answers=(
            AnswerText(title=task.reference, pieces=unmarked(reference)),
            *(AnswerText(title="another reference", pieces=unmarked(text)) for text in others),
            *(answer_block(side, answers[side], reference, graded=graded) for side in sides),
        ),
    )


def answer_block(title: str, answer: AnswerRecord, reference: str, *, graded: bool = False) -> AnswerText:
    """Show one model's answer.

    Args:
        title: Which model.
        answer: Its answer.
        reference: The reference, shortened already.
        graded: Whether the metric grades answers instead of calling them correct or wrong.
    """
    text = shorten(answer.text)
    same = text.strip() == reference.strip()
    return AnswerText(
        title=title,
        pieces=unmarked(text) if same else mark_differences(text, reference),
        verdict="" if graded or answer.score is None else "correct" if answer.score else "wrong",
        remarks=(
            *((f"score {answer.score:.1f}",) if graded and answer.score is not None else ()),
            *(() if answer.stopped else ("hit the token limit",)),
        ),
    )


def last_part(name: str) -> str:
    """Return the last part of a path or id."""
    return name.rstrip("/").rpartition("/")[2] or name


def place_of(row: Place | Item) -> str:
    """Return `file:line` of a row."""
    return last_part(row.file) + (f":{row.line}" if row.line is not None else "")


def shorten(text: str) -> str:
    """Return at most `MAX_CHARACTERS` of a text."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … {len(text) - MAX_CHARACTERS:,} more characters in the run's files"
