"""What the sections of the pages say, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from loratune.reporting.blocks import Block, Chart, Charts, Fold, Items, Paragraph, Sample, Table, build_sections
from loratune.reporting.comparison_page import comparison_page
from loratune.reporting.curves_section import curves
from loratune.reporting.data_section import data
from loratune.reporting.plan_section import _memory_parts, planned_and_actual, planned_train_seconds
from loratune.reporting.result_section import MAX_CLASSES, result
from loratune.reporting.run_files import RunFiles, read_run
from loratune.reporting.run_page import run_page
from loratune.reporting.samples_section import failures, samples
from loratune.reporting.task import ReportedTask, reported_task
from loratune.reporting.units import as_bytes
from loratune.run.directory import RunDir
from loratune.run.records.base import RejectedRow, parse
from loratune.run.records.evaluation import (
    ClassMeasures,
    Confusion,
    EvaluationRecord,
    FinalAdapter,
    GateResult,
    Harness,
    Majority,
)
from loratune.run.records.lock import LockRecord
from loratune.run.records.plan import PlanRecord


@pytest.fixture
def files(finished_run: RunDir) -> RunFiles:
    return read_run(finished_run)


def with_evaluation(files: RunFiles, **changes: Any) -> RunFiles:
    assert files.evaluation is not None
    return replace(files, evaluation=files.evaluation.model_copy(update=changes))


def table_named(blocks: Iterator[Block], caption: str) -> Table:
    (table,) = [block for block in blocks if isinstance(block, Table) and block.caption.startswith(caption)]
    return table


def test_one_damaged_section_costs_no_other() -> None:
    def good(subject: str) -> Iterator[Block]:
        yield Paragraph(text=subject)

    def damaged(subject: str) -> Iterator[Block]:
        yield Paragraph(text=subject)
        raise AttributeError("peak_bytes")

    parts = (("one", "One", good), ("two", "Two", damaged), ("three", "Three", lambda _: iter(())))
    sections = build_sections(parts, "text", ["a file is missing"])
    assert [section.name for section in sections] == ["missing", "one"]
    assert isinstance(sections[0].blocks[1], Items)
    assert sections[0].blocks[1].lines[0] == "a file is missing"
    assert "“Two” is left out" in sections[0].blocks[1].lines[1]


@pytest.mark.parametrize(
    ("kind", "steps", "words"),
    [
        ("last", (9,), ""),
        ("best", (7,), "that of step 7, which has the lowest held-out loss"),
        ("mean", (3, 5), "the mean of the checkpoints of steps 3, 5"),
    ],
)
def test_the_result_says_which_adapter_it_is(files: RunFiles, kind: str, steps: tuple[int, ...], words: str) -> None:
    first = next(result(with_evaluation(files, adapter=FinalAdapter(kind=kind, steps=steps))))
    assert isinstance(first, Paragraph)
    assert words in first.text
    assert ("The adapter is" in first.text) == bool(words)


def test_gates_and_tasks_of_the_harness_are_shown_with_or_without_an_interval(files: RunFiles) -> None:
    sure = {"base": 0.25, "tuned": 0.5, "difference": {"value": 0.25, "low": 0.125, "high": 0.375}}
    unsure = {"base": 1.0, "tuned": 0.75, "difference": {"value": -0.25}}
    harness = parse(Harness, {"version": "0.4", "chat_template": True, "tasks": {"arc": {"acc": sure, "f1": unsure}}})
    gates = (GateResult(gate="nll<=5", value=10.9, passed=False),)
    shown = with_evaluation(files, harness=harness, gates=gates)
    assert table_named(result(shown), "Other data").rows == (
        ("arc: acc", "0.25", "0.5", "+0.25\n+0.125 to +0.375"),
        ("arc: f1", "1", "0.75", "-0.25"),
    )
    assert table_named(result(shown), "Gates").rows == (("nll<=5", "10.9", "failed"),)


@pytest.mark.parametrize("number", [2, MAX_CLASSES + 1])
def test_a_classifier_has_its_classes_and_a_matrix_that_fits(files: RunFiles, number: int) -> None:
    names = tuple(f"class {index}" for index in range(number))
    matrix = tuple(tuple(10 * row + column for column in range(number)) for row in range(number))
    shown = with_evaluation(
        files,
        note="an untrained head",
        majority=Majority(label=names[0], accuracy=0.5, f1=0.25),
        classes=tuple(ClassMeasures(label=n, num_examples=3, precision=None, recall=0.5, f1=0.25) for n in names),
        confusion=Confusion(labels=names, base=matrix[::-1], tuned=matrix),
    )
    blocks = list(result(shown))
    assert table_named(iter(blocks), "Classes, fine-tuned").rows[0] == ("class 0", "3", "–", "50.0%", "25.0%")
    matrices = [block for block in blocks if isinstance(block, Table) and block.caption.startswith("Confusion")]
    assert len(matrices) == (2 if number == 2 else 0)
    if matrices:
        assert matrices[0].rows == (("class 0", "0", "1"), ("class 1", "10", "11"))
        assert matrices[1].rows[0] == ("class 0", "10", "11"), "the base's"


def test_steps_whose_gradient_was_clipped_are_counted(files: RunFiles) -> None:
    assert files.lock is not None
    norms = sorted(step.grad_norm for step in files.steps)
    limit = (norms[-3] + norms[-2]) / 2
    recipe = {**files.lock.recipe, "train": {**files.lock.recipe["train"], "max_grad_norm": limit}}
    (charts,) = curves(replace(files, lock=files.lock.model_copy(update={"recipe": recipe})))
    assert isinstance(charts, Charts)
    (chart,) = [chart for chart in charts.charts if chart.title == "Gradient norm"]
    assert f"are clipped: 2 steps of {len(norms)}" in chart.caption
    assert 'class="rule"' in chart.svg


def test_rejected_rows_are_listed_up_to_a_number(files: RunFiles) -> None:
    assert files.data is not None
    rows = tuple(RejectedRow(file="/a/b.jsonl", line=line, reason="no answer") for line in range(1, 24))
    side = files.data.train.model_copy(update={"rejected": rows})
    blocks = list(data(replace(files, data=files.data.model_copy(update={"train": side}))))
    (fold,) = [block for block in blocks if isinstance(block, Fold) and "rejected" in block.title]
    assert fold.title == "23 rejected rows"
    (items,) = fold.blocks
    assert isinstance(items, Items)
    assert items.lines[0] == "b.jsonl:1 (training): no answer"
    assert items.lines[20:] == ("3 more in data.json",)


def test_a_plan_is_scaled_to_the_steps_that_are_done(files: RunFiles) -> None:
    assert files.plan is not None
    plan = parse(PlanRecord, files.plan.model_dump(mode="json", exclude_unset=True))
    assert planned_train_seconds(plan, plan.time.num_steps) == pytest.approx(plan.time.train_seconds)
    assert planned_train_seconds(plan, 1) == pytest.approx(plan.time.train_seconds / plan.time.num_steps)
    (table,) = [block for block in planned_and_actual(replace(files, plan=plan)) if isinstance(block, Table)]
    assert table.columns == ("", "planned", "actual", "actual / planned")
    assert not list(planned_and_actual(replace(files, plan=None)))


def test_the_parts_of_the_planned_memory_add_up_to_its_peak(files: RunFiles) -> None:
    assert files.plan is not None
    (chart,) = [chart for block in planned_and_actual(files) if isinstance(block, Charts) for chart in block.charts]
    assert isinstance(chart, Chart)
    parts = _memory_parts(files.plan.memory)
    assert sum(size for _, size in parts) == files.plan.memory.peak_bytes
    assert all(size >= 0 for _, size in parts)
    shown = [name for _, name in chart.legend]
    assert [name for name, _ in parts] == [next(n for n, _ in parts if text.startswith(n)) for text in shown]
    assert all(text.endswith(as_bytes(size)) for text, (_, size) in zip(shown, parts, strict=True))


def test_samples_show_both_models_and_failures_the_fine_tuned_one(files: RunFiles) -> None:
    shown = [block for block in samples(files) if isinstance(block, Sample)]
    assert [answer.title for answer in shown[0].answers] == ["reference", "base", "fine-tuned"]
    wrong = [block for block in failures(files) if isinstance(block, Sample)]
    assert all([answer.title for answer in block.answers] == ["reference", "fine-tuned"] for block in wrong)
    graded = with_evaluation(files, metric="bleu")
    assert not list(failures(graded))
    assert "score 0.0" in next(b for b in samples(graded) if isinstance(b, Sample)).answers[1].remarks


def test_pages_need_no_file_but_the_folder(files: RunFiles) -> None:
    nothing = replace(
        files, lock=None, plan=None, data=None, evaluation=None, preview=None, steps=[], held_out=[], events=[]
    )
    page = run_page(nothing)
    assert (page.badge, page.sections) == ("finished", ())
    assert page.lead == "A fine-tuning run of loratune."
    assert [section.name for section in comparison_page([nothing, nothing]).sections] == ["settings", "cost"]
    both = comparison_page([files, nothing])
    assert both.sections[0].name == "results"
    rows = both.sections[0].blocks[-1]
    assert isinstance(rows, Table)
    assert all(row[-1] == "–" for row in rows.rows)


def test_a_task_has_its_own_words_and_a_damaged_lock_the_usual_ones(files: RunFiles) -> None:
    assert files.lock is not None
    assert isinstance(files.evaluation, EvaluationRecord)
    assert reported_task(files.lock).reference == "reference"
    classifier = {**files.lock.recipe, "model": {**files.lock.recipe["model"], "task": "sequence_classification"}}
    labels = files.lock.inputs.model_copy(update={"labels": ("no", "yes")})
    lock = files.lock.model_copy(update={"recipe": classifier, "inputs": labels})
    task = reported_task(lock)
    assert (task.example, task.reference, task.nats) == ("text", "class", "nats per text")
    assert task.trained_on(lock) == "the class of each text: no, yes"
    assert task.load_options(lock) == ", num_labels=2"
    assert "misclassifies" in task.failures(files.evaluation, 1, "")
    for damaged in (None, LockRecord.model_construct(), LockRecord.model_construct(recipe={"model": {"task": "<b>"}})):
        assert type(reported_task(damaged)) is ReportedTask
