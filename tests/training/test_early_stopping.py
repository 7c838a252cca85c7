"""Early stopping: when, and that it is the same step whatever happens on the way."""

from __future__ import annotations

import math
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import Interrupted, RecipeError
from loratune.training.early_stopping import evaluations_without_improvement
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import write_jsonl
from tests.invariants.test_processes import trained
from tests.invariants.test_same_mathematics import assert_same
from tests.training.test_disk import Moment
from tests.training.test_signals import send

MakeRecipe = Callable[..., Recipe]
SETTINGS = {
    "lora__targets": "complete",
    "lora__dropout": 0.1,
    "train__eval_every": 1,
    "train__save_every": 4,
    "train__early_stopping": 2,
    "train__final_adapter": "best",
}


def stops_at_by_transformers(losses: list[float], patience: int) -> int | None:
    """After which of these evaluations transformers' callback ends a run; the trainer keeps `best_metric` for it."""
    callback, state, control = EarlyStoppingCallback(patience), TrainerState(), TrainerControl()
    args = SimpleNamespace(metric_for_best_model="eval_nll", greater_is_better=False)
    for number, loss in enumerate(losses, start=1):
        callback.on_evaluate(args, state, control, {"eval_nll": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
        if control.should_training_stop:
            return number
    return None


def test_evaluations_are_counted_as_transformers_counts_them() -> None:
    drawn = random.Random(0)
    ends = set()
    for _ in range(300):
        losses = [drawn.choice([1.0, 1.1, 1.2, 1.3, 1.4, math.nan]) for _ in range(7)]
        if math.isnan(losses[0]):
            continue  # with which transformers compares every later one, and calls none lower
        for patience in (1, 2, 3):
            held_out: dict[int, float | None] = {}
            ours = None
            for number, loss in enumerate(losses, start=1):
                held_out |= {10 * number: loss, 10 * number + 1: None}  # failed ones do not count
                if evaluations_without_improvement(held_out) >= patience:
                    ours = number
                    break
            assert ours == stops_at_by_transformers(losses, patience)
            ends.add(ours)
    assert ends == {None, 2, 3, 4, 5, 6, 7}


@pytest.fixture
def worse(tiny_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Recipes whose held-out answers have words that training never shows: the longer it trains, the worse they get."""
    said = [{"role": "user", "content": "Describe"}, {"role": "assistant", "content": "quartz zebra 7 7 7"}]
    other = write_jsonl(tmp_path / "other.jsonl", [{"messages": said}])

    def make(name: str, **settings: object) -> Recipe:
        merged = {**SETTINGS, "train__epochs": 4, "train__learning_rate": 3e-2, **settings}
        return tiny_recipe(**merged, data__eval=str(other), train__output_dir=str(tmp_path / name))

    return make


def held_out(run: RunDir) -> dict[int, float]:
    return {line["step"]: line["eval_nll"] for line in run.read_metrics() if "eval_nll" in line}


def events(run: RunDir) -> list[dict[str, object]]:
    return [line for line in run.read_metrics() if line.get("event") == "early_stopping"]


@pytest.mark.slow
def test_a_run_ends_where_its_losses_say_with_the_best_adapter(worse: MakeRecipe, tmp_path: Path) -> None:
    recipe = worse("whole")
    listener = Moment("", lambda: None)
    run = train(recipe, progress=listener).run
    losses = held_out(run)
    last = max(losses)
    assert stops_at_by_transformers(list(losses.values()), 2) == last
    assert 3 <= last < 12
    assert f"training ended early, after step {last} of 12" in listener.lines
    (event,) = events(run)
    lowest = min(losses, key=lambda step: losses[step])
    assert (event["step"], event["lowest_at"]) == (last, lowest)
    assert (run.checkpoints / str(last)).is_dir(), "its last step is saved, as every run's is"
    assert read_json(run.plan)["time"]["is_upper_bound"]
    # a checkpoint a step: the best of them is what the run ends with
    run = train(worse("each", train__save_every=1)).run
    kept = load_file(run.checkpoints / str(lowest) / "adapter_model.safetensors")
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    assert all(adapter[name].equal(weight) for name, weight in kept.items())
    assert read_json(run.evaluation)["tuned"]["nll"] == pytest.approx(losses[lowest], abs=1e-6)
    # without patience the same steps are taken, and more of them
    longer = train(worse("longer", train__early_stopping=None)).run
    assert held_out(longer).items() >= losses.items()
    assert max(held_out(longer)) == 12
    assert not events(longer)


@pytest.mark.slow
def test_a_resumed_run_ends_at_the_same_step(worse: MakeRecipe) -> None:
    whole = train(worse("whole")).run
    last = max(held_out(whole))
    # killed when all was done but the adapter: the last checkpoint is there
    killed = train(worse("killed")).run
    shutil.rmtree(killed.adapter)
    resume(killed.root)
    assert_same(whole, killed, tolerance=0)
    # killed before that checkpoint was written
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / str(last))
    resume(killed.root)
    assert_same(whole, killed, tolerance=0)
    assert len(events(killed)) == 1
    # stopped by the user at the very step whose evaluation is the last one
    recipe = worse("stopped")
    with pytest.raises(Interrupted, match=f"stopped after step {last} of 12"):
        train(recipe, progress=Moment("training", send(signal.SIGINT), at=last + 1))
    stopped = RunDir.open(recipe.train.output_dir)
    assert max(held_out(stopped)) == last - 1
    resume(stopped.root)
    assert_same(whole, stopped, tolerance=0)
    assert len(events(stopped)) == 1


WITHOUT_DROPOUT = {"lora__dropout": 0.0, "train__learning_rate": 1e-2, "train__early_stopping": 1}


@pytest.mark.slow
def test_both_engines_end_at_the_same_step(worse: MakeRecipe) -> None:
    fast = train(worse("fast", **WITHOUT_DROPOUT)).run
    stock = train(worse("trl", **WITHOUT_DROPOUT, train__engine="trl")).run
    assert 2 <= max(held_out(fast)) < 12
    assert_same(fast, stock, tolerance=1e-5)


@pytest.mark.slow
def test_two_processes_end_at_the_same_step(worse: MakeRecipe, tmp_path: Path) -> None:
    fast = train(worse("fast", **WITHOUT_DROPOUT)).run
    two = trained(2, worse("two", **WITHOUT_DROPOUT), tmp_path)
    assert_same(fast, two, tolerance=1e-5)
    assert len(events(two)) == 1


@pytest.mark.parametrize("settings", [{"train__eval_every": "never"}, {"data__eval": "none"}])
def test_patience_without_held_out_losses_is_refused(tiny_recipe: MakeRecipe, settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="early_stopping is"):
        tiny_recipe(train__early_stopping=2, **settings)
