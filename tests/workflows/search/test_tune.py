"""Settings that are found within a time budget, with reasons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.records.sweep import RungResult, SweepRecord, TrialDifference, TrialResult
from loratune.workflows.search import tune as module
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


def test_a_rate_diverges_that_fails_or_ends_worse_than_the_lowest() -> None:
    assert diverging_rates(record(2.0, 1.8, 1.5, 1.0, 1.1, 2.5, None)) == ["3e-3", "1e-2"]
    assert diverging_rates(record(2.0, 1.9, 1.8)) == []
    words = module._reason_for_rate(record(2.0, 1.8, 1.5, 1.0, 1.1, 2.5, None))
    assert words.startswith(
        "train.learning_rate=3e-4: the lowest held-out loss of 7 rates, 1.0000 nats after step 8; 1e-3 "
    )
    assert "worse at 3e-3, 1e-2" in words
    assert "beyond" not in words
    assert "may lie beyond" in module._reason_for_rate(record(2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4))


def test_of_adapters_that_cannot_be_told_apart_the_smallest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_adapter_size", lambda trial: int(trial.settings["lora.r"]))
    found = record(1.1, 1.0, 1.15, 1.9, key="lora.r", values=("16", "32", "8", "4"))
    chosen, reason = module._choose_shape(found)
    assert chosen == {"lora.r": "8"}
    assert reason == "lora.r=8: the smallest adapter that cannot be told apart from the best one (r=32), after step 8."
    chosen, reason = module._choose_shape(record(1.0, 1.9, key="lora.r", values=("32", "4")))
    assert chosen == {"lora.r": "32"}
    assert "the lowest held-out loss of 2 adapters" in reason


def test_alpha_follows_the_rank() -> None:
    shapes = module._shapes(Recipe().replace(lora={"r": 16, "alpha": 24, "targets": ["q_proj", "v_proj"]}))
    assert len(shapes) == 9
    assert shapes[0] == {"lora.r": "16", "lora.alpha": "24", "lora.targets": "[q_proj, v_proj]"}
    assert {(shape["lora.r"], shape["lora.alpha"]) for shape in shapes} == {("16", "24"), ("8", "12"), ("32", "48")}
    assert len(module._shapes(Recipe().replace(lora={"targets": "complete", "r": 8}))) == 4


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
