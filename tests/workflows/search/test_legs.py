"""A run that is taken to its end in several legs, and one that ends early."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.progress import NO_PROGRESS
from loratune.training import trainer
from loratune.workflows import start
from loratune.workflows.resume import continue_run
from loratune.workflows.search.sweep import sweep
from loratune.workflows.steps import Leg, Paused
from loratune.workflows.train import train
from tests.workflows.search.test_sweep import checkpoints, trajectory


def test_a_trial_that_ended_early_has_the_step_at_which_it_ended(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    rising = itertools.count(1.0)
    monkeypatch.setattr(trainer, "mean_nll", lambda _: next(rising))
    recipe = tiny_recipe(train__epochs=1, train__eval_every=1, train__save_every=1, train__early_stopping=1)
    (early,) = sweep(recipe, ["train.learning_rate=1..2"], trials=1).record.trials
    taken = max(line["step"] for line in RunDir.open(early.run).read_metrics())
    assert early.state == "finished"
    assert early.rungs[-1].step == taken == 2


@pytest.mark.parametrize(
    ("settings", "losses", "pause", "kept"),
    [
        # The held-out loss is lowest at the pause, where the recipe saves nothing; the best that it saves is earlier.
        ({"save_every": 2, "final_adapter": "best"}, [9, 6, 5, 8, 8, 8], 3, ["2", "6"]),
        # Early stopping ends the run at the pause.
        pytest.param({"save_every": 2, "early_stopping": 1}, [5, 4, 6], 3, ["2", "3"], marks=pytest.mark.slow),
        pytest.param({"save_every": 2, "early_stopping": 2}, [5, 7, 6], 3, ["3"], marks=pytest.mark.slow),
        pytest.param({"save_every": "never", "early_stopping": 2}, [5, 7, 6], 3, [], marks=pytest.mark.slow),
        # The recipe saves a checkpoint before the learning rate falls.
        pytest.param(
            {"save_every": 6, "schedule": "warmup_stable_decay"},
            [9, 8, 7, 6, 5, 4],
            4,
            ["4", "6"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_was_paused_keeps_the_checkpoints_of_one_that_was_not(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    losses: list[float],
    pause: int,
    kept: list[str],
) -> None:
    given = {f"train__{name}": value for name, value in settings.items()}
    recipe = tiny_recipe(train__eval_every=1, train__keep_checkpoints=1, **given)
    measured = itertools.cycle(map(float, losses))
    monkeypatch.setattr(trainer, "mean_nll", lambda _: next(measured))
    alone = train(recipe).run
    prepared = prepare(recipe, NO_PROGRESS)
    run = RunDir.create(tmp_path / "paused", overwrite=False)
    with pytest.raises(Paused):
        start.start_run(prepared, run, recipe.to_yaml(), NO_PROGRESS, Leg(until=pause))
    assert str(pause) in checkpoints(run)
    continue_run(run, NO_PROGRESS, prepared, Leg(dropped=pause))
    assert checkpoints(run) == checkpoints(alone) == kept
    assert run.best.is_file() == alone.best.is_file()
    assert not run.best.is_file() or read_json(run.best) == read_json(alone.best)
    assert run.adapter_weights.read_bytes() == alone.adapter_weights.read_bytes()
    assert trajectory(run) == trajectory(alone)
