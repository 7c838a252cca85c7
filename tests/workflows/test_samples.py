"""Answers during training: they are recorded where the recipe says, and change nothing of the run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loratune.recipe.recipe import Recipe
from loratune.reporting.run_files import read_run
from loratune.reporting.run_page import run_page
from loratune.reporting.samples_section import answers_during_training
from loratune.reporting.watch import watch_rows
from loratune.run.directory import RunDir
from loratune.run.errors import Interrupted, RecipeError
from loratune.workflows import samples as module
from loratune.workflows.resume import resume
from loratune.workflows.samples import NUM_SAMPLES
from loratune.workflows.train import train
from tests.invariants.test_processes import TORCHRUN, command, write_recipe
from tests.invariants.test_same_mathematics import assert_same

SHORT: dict[str, Any] = {"evaluate__samples": 5, "evaluate__max_new_tokens": 3, "lora__dropout": 0.1}


def answered(run: RunDir) -> dict[int, Any]:
    return {line["step"]: line["answers"] for line in run.read_metrics() if line.get("event") == "samples"}


def trajectory(run: RunDir) -> list[Any]:
    return [(line["loss"], line["grad_norm"]) for line in run.read_metrics() if "loss" in line]


@pytest.fixture
def recipes(tiny_recipe: Callable[..., Recipe], tmp_path: Any) -> Callable[..., Recipe]:
    def make(name: str, **settings: Any) -> Recipe:
        values: dict[str, Any] = {**SHORT, "train__output_dir": str(tmp_path / name), "train__save_every": 2}
        return tiny_recipe(**{**values, **settings})

    return make


def test_prompts_are_answered_and_the_run_is_the_one_without_answers(recipes: Callable[..., Recipe]) -> None:
    plain = train(recipes("plain")).run
    run = train(recipes("looked", evaluate__samples_every=2)).run
    total = len(trajectory(run))
    assert trajectory(run) == trajectory(plain)
    assert run.adapter_weights.read_bytes() == plain.adapter_weights.read_bytes()
    assert list(answered(run)) == list(range(2, total, 2)), "after the last step, the evaluation answers"
    assert answered(plain) == {}
    for answers in answered(run).values():
        assert len(answers) == NUM_SAMPLES
        assert all(answer["question"] and answer["reference"] for answer in answers)

    files = read_run(run)
    assert [line.step for line in files.samples] == list(answered(run))
    assert files.events == [], "answers are no mishaps"
    (section,) = [section for section in run_page(files).sections if section.name == "progress"]
    assert len(section.blocks) == NUM_SAMPLES
    newest = list(answers_during_training(files, newest_only=True))
    assert [block.kind for block in newest] == ["sample"] * NUM_SAMPLES + ["fold"]
    assert newest[0].title == f"1 · after step {max(answered(run)):,}"  # type: ignore[union-attr]
    run.evaluation.unlink()  # as while it trains
    shown = dict(watch_rows(read_run(run), 80))
    assert shown["prompt"] == " ".join(answered(run)[max(answered(run))][-1]["question"].split())


class _Stop(TrainerCallback):
    """Asks for a stop during a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self._step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_was_stopped_at_its_answers_has_them_when_it_is_resumed(recipes: Callable[..., Recipe]) -> None:
    whole = train(recipes("whole", evaluate__samples_every=2)).run
    recipe = recipes("stopped", evaluate__samples_every=2)
    with pytest.raises(Interrupted, match="after step 2"):
        train(recipe, callbacks=[_Stop(2)])
    run = RunDir.open(recipe.train.output_dir)
    assert answered(run) == {}, "who stops does not wait for answers"
    assert answered(resume(run.root).run) == answered(whole)
    assert trajectory(run) == trajectory(whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_record_the_answers_of_one(recipes: Callable[..., Recipe], tmp_path: Path, strategy: str) -> None:
    """With ddp the first answers while the other waits in the next step; with fsdp both answer."""
    settings = {"evaluate__samples_every": 2, "train__token_budget": 150}
    alone = train(recipes("alone", **settings)).run
    file, run = write_recipe(recipes("two", **settings, train__strategy=strategy), tmp_path, "two")
    done = command([*TORCHRUN, "--nproc-per-node=2", "-m", "loratune", "train", file])
    assert done.returncode == 0, done.stderr
    assert answered(run) == answered(alone)
    assert_same(alone, run, tolerance=1e-5)


def test_a_failure_is_recorded_and_costs_nothing(
    recipes: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, "generate_answers", fail)
    run = train(recipes("failed", evaluate__samples_every=3)).run
    events = read_run(run).events
    assert {event.event for event in events} == {"samples_failed"}
    assert events[0].message == "no held-out prompt was answered: RuntimeError: no such kernel"
    assert run.is_complete


def test_what_cannot_be_answered_is_refused(recipes: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.samples_every is 2, but evaluate\.samples is 0"):
        recipes("none", evaluate__samples_every=2, evaluate__samples=0)
    with pytest.raises(RecipeError, match=r"evaluate\.samples_every is 2, but data\.eval is none"):
        recipes("unheld", evaluate__samples_every=2, evaluate__metric="none", data__eval="none")
    with pytest.raises(RecipeError, match=r"evaluate\.samples_every is 1\.5, neither"):
        recipes("wrong", evaluate__samples_every=1.5)
