"""Answers to held-out prompts, side by side, with what is wrong in them marked."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.reporting.blocks import Answer, Block, Paragraph, Sample
from loratune.reporting.run_files import RunFiles
from loratune.reporting.units import is_graded
from loratune.reporting.word_diff import Piece, marked, whole
from loratune.run.directory import Record
from loratune.run.errors import plural

NUM_SAMPLES = 20
MOST_FAILURES = 100
MOST_LETTERS = 2000
"""Of one text; the rest stands in the file that it came from."""


def samples(files: RunFiles) -> Iterator[Block]:
    items = files.evaluation.get("items")
    if not items:
        return
    shown = items[:NUM_SAMPLES]
    what = "held-out text" if files.classifies else "held-out prompt"
    marks = (
        " Words that differ from the reference are marked: underlined what the answer has instead, struck "
        "through what it lacks. An answer with little in common with the reference is left unmarked."
    )
    yield Paragraph(
        text=f"The first {len(shown)} of {plural(len(items), what)}, in the order of the data, so nobody chose them."
        + ("" if files.classifies else marks)
    )
    graded = is_graded(files.evaluation["metric"])
    for number, item in enumerate(shown, 1):
        yield _sample(number, item, sides=("base", "tuned"), graded=graded, classifies=files.classifies)


def failures(files: RunFiles) -> Iterator[Block]:
    items = files.evaluation.get("items")
    if not items or is_graded(files.evaluation["metric"]):
        return
    wrong = [(number, item) for number, item in enumerate(items, 1) if not item["tuned"]["score"]]
    if not wrong:
        yield Paragraph(text=f"None: all {plural(len(items), 'answer')} are right.")
        return
    broken = [pair for pair in wrong if pair[1]["base"]["score"]]
    endless = sum(not item["tuned"]["stopped"] for _, item in wrong)
    if files.classifies:
        text = f"The tuned model names {len(wrong):,} of {len(items):,} wrong; {len(broken):,} of these the base model names right."
    else:
        text = (
            f"The tuned model answers {len(wrong):,} of {len(items):,} wrong; {len(broken):,} of these the base model "
            f"answers right. {endless:,} did not stop by themselves within {_max_new_tokens(files)}."
        )
    yield Paragraph(text=text)
    ordered = [*broken, *(pair for pair in wrong if pair not in broken)]
    for number, item in ordered[:MOST_FAILURES]:
        yield _sample(number, item, sides=("tuned",), classifies=files.classifies)
    if len(ordered) > MOST_FAILURES:
        yield Paragraph(text=f"{len(ordered) - MOST_FAILURES:,} more stand in evaluation.json.", tone="note")


def _max_new_tokens(files: RunFiles) -> str:
    number = files.lock.get("recipe", {}).get("evaluate", {}).get("max_new_tokens")
    return f"{number:,} tokens" if number else "the tokens allowed"


def _sample(
    number: int, item: Record, sides: tuple[str, ...], *, graded: bool = False, classifies: bool = False
) -> Sample:
    reference = cut(item["reference"])
    others = (cut(text) for text in item.get("references", [])[1:])
    return Sample(
        title=f"{number} · {place(item)}",
        prompt=cut(item["question"]),
        asked="text" if classifies else "prompt",
        answers=(
            Answer(title="class" if classifies else "reference", pieces=whole(reference)),
            *(Answer(title="another reference", pieces=whole(text)) for text in others),
            *(answer(side, item[side], reference, graded=graded) for side in sides),
        ),
    )


def answer(title: str, record: Record, reference: str, *, graded: bool = False) -> Answer:
    """What one model said, against the reference (shortened already)."""
    right = bool(record["score"])
    text = cut(record["text"])
    return Answer(
        title=title,
        pieces=_pieces(text, reference),
        verdict="" if graded else "right" if right else "wrong",
        remarks=(
            *((f"{record['score']:.1f} by itself",) if graded else ()),
            *(() if record["stopped"] else ("did not stop",)),
        ),
    )


def _pieces(text: str, reference: str) -> tuple[Piece, ...]:
    return whole(text) if text.strip() == reference.strip() else marked(text, reference)


def short(name: str) -> str:
    """The last part of a path or id."""
    return name.rstrip("/").rpartition("/")[2] or name


def place(row: Record) -> str:
    return short(row["file"]) + (f":{row['line']}" if row["line"] is not None else "")


def cut(text: str) -> str:
    if len(text) <= MOST_LETTERS:
        return text
    return f"{text[:MOST_LETTERS]} … {len(text) - MOST_LETTERS:,} more letters in the run's files"
