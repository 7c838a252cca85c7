"""Settings that are found within a time budget, with reasons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune.model.adapter.variants import scale_of
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.errors import MachineError, RecipeError
from loratune.run.progress import NO_PROGRESS
from loratune.run.records.sweep import RungResult, SweepRecord, TrialDifference, TrialResult
from loratune.workflows.search import tune as module
from loratune.workflows.search.folder import SweepDir, TuneDir
from loratune.workflows.search.settings import as_words, with_settings
from loratune.workflows.search.tune import RATES, diverging_rates, tune


def record(*losses: float | None, key: str = "train.learning_rate", values: tuple[str, ...] = RATES) -> SweepRecord:
    """A sweep whose trials have these losses; None for one that failed."""
    trials = [
        TrialResult(
            number=number,
            run=f"trials/{number:02}",
            settings={key: value},
            state="failed" if loss is None else "finished",
            rungs=() if loss is None else (RungResult(step=8, nll=loss, seconds=1.0),),
            to_best=None if loss is None else TrialDifference(step=8, value=loss - 1, low=loss - 1.2, high=loss),
            problem="the loss is nan" if loss is None else "",
        )
        for number, (value, loss) in enumerate(zip(values, losses, strict=False), 1)
    ]
    trials.sort(key=lambda trial: trial.rungs[0].nll if trial.rungs else 99)
    trials[0] = trials[0].model_copy(update={"to_best": None})
    where = {"folder": "f", "recipe": "r", "page": "p", "num_examples": 9, "level": 0.95, "rungs": (1.0,)}
    return SweepRecord(
        state="finished", best=trials[0].number, trials=tuple(trials), sensitivity=(), sentences=(), **where
    )


def first_losses(*losses: float | None, noise: float = 0.05) -> dict[int, list[tuple[float, int]]]:
    """The losses of 60 rows at the first rung, with these means."""
    return {
        number: [(float(loss + value), 1) for value in np.random.default_rng(number).normal(0, noise, 60)]
        for number, loss in enumerate(losses, 1)
        if loss is not None
    }


def test_a_rate_diverges_that_fails_or_ends_worse_than_the_lowest() -> None:
    losses = (2.0, 1.8, 1.5, 1.0, 1.1, 2.5, None)
    assert diverging_rates(record(*losses), first_losses(*losses)) == ["3e-3", "1e-2"]
    assert diverging_rates(record(2.0, 1.9, 1.8), first_losses(2.0, 1.9, 1.8)) == []
    words = module._reason_for_rate(record(*losses), first_losses(*losses))
    assert words.startswith(
        "train.learning_rate=3e-4: the lowest held-out loss of 7 rates, 1.0000 nats after step 8; 1e-3 "
    )
    assert "worse at 3e-3, 1e-2" in words
    assert "beyond" not in words
    losses = (2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4)
    assert "may lie beyond" in module._reason_for_rate(record(*losses), first_losses(*losses))


def test_a_rate_does_not_diverge_by_chance_nor_if_it_wins_in_the_end() -> None:
    found = record(2.0, 1.8, 2.02)
    assert diverging_rates(found, first_losses(2.0, 1.8, 2.02, noise=0.5)) == []
    assert diverging_rates(found, first_losses(2.0, 1.8, 2.02, noise=0.001)) == ["1e-4"]
    # The first rung has other losses than the last one, where 3e-5 is best and 1e-4 cannot be told apart.
    assert diverging_rates(record(2.0, 1.0, 1.1, 1.9), first_losses(2.0, 2.5, 2.5, 2.5)) == ["3e-4"]


def test_a_rate_that_there_was_no_time_for_is_not_called_worse() -> None:
    found = record(2.0, 1.8, None)
    untried = found.trials[-1].model_copy(update={"problem": "", "state": "waiting"})
    words = module._reason_for_rate(found.model_copy(update={"trials": (*found.trials[:-1], untried)}), {})
    assert "lowest held-out loss of 2 rates" in words
    assert "no time was left to try 1e-4" in words


def test_of_adapters_that_cannot_be_told_apart_the_smallest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_adapter_size", lambda trial: int(trial.settings["lora.r"]))
    found = record(1.1, 1.0, 1.15, 1.9, key="lora.r", values=("16", "32", "8", "4"))
    chosen, reason = module._choose_shape(found)
    assert chosen == {"lora.r": "8"}
    assert reason == "lora.r=8: the smallest adapter that cannot be told apart from the best one (r=32), after step 8."
    chosen, reason = module._choose_shape(record(1.0, 1.9, key="lora.r", values=("32", "4")))
    assert chosen == {"lora.r": "32"}
    assert "the lowest held-out loss of 2 adapters" in reason


def test_a_small_adapter_that_stopped_early_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_adapter_size", lambda trial: int(trial.settings["lora.r"]))
    found = record(1.1, 1.0, key="lora.r", values=("8", "32"))
    best, small = found.trials
    early = small.model_copy(update={"rungs": (small.rungs[0].model_copy(update={"step": 5}),)})
    chosen, _ = module._choose_shape(found.model_copy(update={"trials": (best, early)}))
    assert chosen == {"lora.r": "8"}
    dropped = early.model_copy(update={"state": "dropped"})
    chosen, _ = module._choose_shape(found.model_copy(update={"trials": (best, dropped)}))
    assert chosen == {"lora.r": "32"}


@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_every_shape_has_the_scale_of_the_recipe(variant: str) -> None:
    lora = {"r": 16, "alpha": 24, "variant": variant}
    recipe = Recipe().replace(lora=lora)
    scales = [scale_of(with_settings(recipe, as_words(shape)).lora) for shape in module._shapes(recipe)]
    assert scales == pytest.approx([scale_of(recipe.lora)] * len(scales))
    patterns = recipe.replace(lora={**lora, "rank_pattern": {"o_proj": 4}})
    assert {shape["lora.r"] for shape in module._shapes(patterns)} == {"16"}


def test_alpha_follows_the_rank() -> None:
    shapes = module._shapes(Recipe().replace(lora={"r": 16, "alpha": 24, "targets": ["q_proj", "v_proj"]}))
    assert len(shapes) == 9
    assert shapes[0] == {"lora.r": "16", "lora.alpha": "24", "lora.targets": "[q_proj, v_proj]"}
    assert {(shape["lora.r"], shape["lora.alpha"]) for shape in shapes} == {("16", "24"), ("8", "12"), ("32", "48")}
    assert len(module._shapes(Recipe().replace(lora={"targets": "complete", "r": 8}))) == 4


def test_shapes_that_cannot_be_trained_are_left_out_and_named(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    wrong = {"lora.targets": "[no_such_module]"}
    fitting, left_out = module._fitting(recipe, [{"lora.r": "4"}, wrong], NO_PROGRESS)
    assert fitting == [{"lora.r": "4"}]
    (sentence,) = left_out
    assert sentence.startswith("targets=[no_such_module] is left out: ")


def test_what_is_started_over_leaves_nothing_of_what_was_found_before(tmp_path: Path) -> None:
    folder = TuneDir(tmp_path / "x-tune")
    with folder.exclusive():
        assert folder.is_in_use
        for sweep in (folder.rates, folder.shapes):
            SweepDir.create(sweep.root, overwrite=False).plan.write_text("{}")
        folder.result.touch()
        with pytest.raises(RecipeError, match="another run is using"), folder.exclusive(overwrite=True):
            pass
    assert folder.shapes.plan.is_file(), "nothing is taken from under a command that works on it"
    with folder.exclusive():
        assert folder.result.is_file()
    assert [TuneDir.around(sweep.root) for sweep in (folder.rates, folder.shapes)] == [folder, folder]
    assert TuneDir.around(folder.root) is None
    with folder.exclusive(overwrite=True):
        left = sorted(path.name for path in folder.root.rglob("*") if not path.name.startswith("."))
    assert left == ["losses", "losses", "rates", "shapes"]


@pytest.mark.slow
def test_where_no_other_shape_fits_the_reason_is_not_the_time(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(recipe: Recipe, *rest: Any, **more: Any) -> Any:
        if recipe.lora.r != 4 or recipe.lora.targets != "balanced":
            raise MachineError("does not fit")
        return prepare(recipe, *rest, **more)

    monkeypatch.setattr(module, "prepare", refuse)
    monkeypatch.setattr(module, "RATES", ("1e-3", "1e-2"))
    found = tune(tiny_recipe(train__epochs=1), budget=3600).record
    assert found.shapes is None
    assert found.reasons[1] == "lora.r and lora.targets stay as they are: no others can be trained on this machine."
    assert len(found.reasons) == 2 + 8
    assert found.reasons[2] == "r=8, alpha=64, targets=balanced is left out: does not fit."


@pytest.mark.slow
def test_a_recipe_is_tuned_and_written_and_the_same_call_finds_the_same(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(train__epochs=3, train__learning_rate=1e-5, evaluate__metric="exact_match")
    result = tune(recipe, budget=3600)
    assert "tuned.yaml" in repr(result)
    found = result.record
    tuned = Recipe.load(result.recipe)
    assert tuned.train.learning_rate == float(found.settings["train.learning_rate"]) >= 1e-3
    assert tuned.lora.r == int(found.settings["lora.r"])
    assert tuned.lora.alpha / tuned.lora.r == recipe.lora.alpha / recipe.lora.r
    assert tuned.evaluate.metric == "exact_match"
    assert tuned.train.output_dir == recipe.train.output_dir
    assert len(found.reasons) == 2
    assert found.rates.state == "finished"
    assert found.shapes is not None
    assert Path(found.rates.page).is_file()
    again = tune(recipe, budget=3600).record
    assert again.settings == found.settings
    assert again.reasons == found.reasons
    short = tune(recipe.replace(train={"output_dir": recipe.train.output_dir + "2"}), budget=1e-6).record
    assert short.shapes is None
    assert "no time was left" in short.reasons[1]
