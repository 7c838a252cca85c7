"""Which trials wait, are dropped or go on, by trials that are measured and not trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS
from loratune.run.records.files import write_record
from loratune.run.records.sweep import SweepPlanRecord, TrialLosses
from loratune.workflows.search import legs as module
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.results import rank_trials
from loratune.workflows.search.rungs import run_sweep
from loratune.workflows.search.shared_base import SharedBase
from loratune.workflows.search.sweep import _plan
from loratune.workflows.search.trials import Trial


def stand_in(folder: SweepDir, number: int, *losses: float, ends: bool = False, problem: str = "") -> Trial:
    """A trial that is looked at but not trained, and was measured at the first rungs."""
    for rung, loss in enumerate(losses):
        is_final = ends and rung + 1 == len(losses)
        values = {"step": 4 * 2**rung, "is_final": is_final, "losses": [(10 * loss, 10)] * 30, "seconds": 1.0}
        write_record(folder.losses(number, rung), TrialLosses, values)
    if problem:
        values = {"step": 4, "is_final": False, "losses": [], "seconds": 1.0, "problem": problem}
        write_record(folder.losses(number, len(losses)), TrialLosses, values)
    estimate = SimpleNamespace(num_steps=16, time=SimpleNamespace(train_seconds=100.0, evaluate_seconds=1.0))
    recipe = SimpleNamespace(model=SimpleNamespace(dtype="float32"), train=SimpleNamespace(device="cuda"))
    prepared: Any = SimpleNamespace(estimate=estimate, recipe=recipe)
    run: Any = SimpleNamespace(root=folder.trial(number).root, is_complete=ends)
    return Trial(number=number, settings={"lora.r": str(number)}, recipe=Recipe(), prepared=prepared, run=run)


def plan_of(trials: list[Trial]) -> SweepPlanRecord:
    settings = tuple(trial.settings for trial in trials)
    return SweepPlanRecord(recipe={}, trials=settings, rungs=(0.25, 0.5, 1.0), dtype="float32")


def test_a_trial_that_ended_early_counts_as_far_as_the_others_got(tmp_path: Path) -> None:
    """A rate that diverged and was stopped is not the best only because it has ended, or because another failed."""
    folder = SweepDir.create(tmp_path / "sweep", overwrite=False)
    diverged = stand_in(folder, 1, 5.0, ends=True)
    trials = [
        diverged,
        stand_in(folder, 2, 1.0),
        stand_in(folder, 3, 1.6),
        stand_in(folder, 4, 0.9, 0.8, problem="nan"),
    ]
    legs = module.Legs(folder, plan_of(trials), SharedBase(), NO_PROGRESS)
    ranked = rank_trials(legs.measured(trials), waiting={2, 3})
    assert [trial["number"] for trial in ranked["trials"]] == [2, 3, 1, 4]
    stand_in(folder, 2, 1.0, 0.9)
    assert [len(trial.rungs) for trial in legs.measured(trials)] == [2, 2, 1, 3]
    assert legs.measured(trials[3:])[0].problem == "nan"
    assert [trial["number"] for trial in rank_trials(legs.measured(trials), waiting={2})["trials"]] == [2, 1, 3, 4]


def test_trials_that_are_cut_for_lack_of_time_are_waiting(tmp_path: Path) -> None:
    """Of four trials two go on, and there was time to take one of them further."""
    folder = SweepDir.create(tmp_path / "sweep", overwrite=False)
    trials = [stand_in(folder, 1, 1.0, 1.0, 1.0, ends=True), *(stand_in(folder, number, 1.0) for number in (2, 3, 4))]
    plan = plan_of(trials)
    legs = module.Legs(folder, plan, SharedBase(), NO_PROGRESS)
    record = run_sweep(folder, plan, trials, legs=legs, budget=1e-6, progress=NO_PROGRESS)
    assert record.state == "time is up"
    states = {trial.number: trial.state for trial in record.trials}
    assert states == {1: "finished", 2: "waiting", 3: "dropped", 4: "dropped"}


@pytest.mark.parametrize("halving", [True, False])
def test_a_sweep_with_halving_is_not_continued_as_one_without(tmp_path: Path, *, halving: bool) -> None:
    folder = SweepDir.create(tmp_path / "sweep", overwrite=False)
    trials = [stand_in(folder, number) for number in (1, 2)]
    plan = _plan(folder, Recipe(), trials, halving=halving, budget=None)
    assert (len(plan.rungs) > 1) is halving
    assert _plan(folder, Recipe(), trials, halving=halving, budget=1.0) == plan
    with pytest.raises(RecipeError, match=f"begun {'with' if halving else 'without'} halving") as caught:
        _plan(folder, Recipe(), trials, halving=not halving, budget=None)
    assert "--overwrite" in caught.value.fix
    single = SweepDir.create(tmp_path / "single", overwrite=False)  # of which nothing is dropped
    plan = _plan(single, Recipe(), trials[:1], halving=halving, budget=1.0)
    assert _plan(single, Recipe(), trials[:1], halving=not halving, budget=None) == plan
