from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest

from loratune.errors import MachineError, RecipeError
from loratune.pipeline import plan, train
from loratune.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_disk_for_the_checkpoints_is_told_before_anything_is_loaded(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(MachineError, match="checkpoints and the adapter need") as error:
        plan(tiny_recipe())
    assert "train.keep_checkpoints=1" in error.value.fix


def test_too_little_memory_for_one_example_is_told_before_anything_is_loaded(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.planning import memory

    monkeypatch.setattr(memory, "SHARE", 1e-6)
    with pytest.raises(MachineError, match=r"one example of .* tokens needs"):
        plan(tiny_recipe())


def test_the_promise_has_the_fields_that_others_rely_on(tiny_recipe: MakeRecipe) -> None:
    record = plan(tiny_recipe()).as_plan()
    assert record["parameters"]["trainable"] == 2 * 4 * (32 + 32 + 32 + 16)
    assert record["parameters"]["total"] > record["parameters"]["trainable"]
    assert record["memory"]["peak_bytes"] > 0
    assert record["time"]["train_seconds"] > 0
    assert record["data"]["num_examples"] == 20
    assert 0 < record["data"]["num_supervised_tokens"] < record["data"]["num_tokens"]


def test_what_auto_became_is_recorded_with_its_reason(tiny_recipe: MakeRecipe) -> None:
    prepared = plan(tiny_recipe(model__dtype="auto", train__device="auto"))
    assert prepared.recipe.model.dtype in ("float32", "bfloat16")
    assert "auto" not in (prepared.recipe.train.device, prepared.recipe.train.token_budget)
    assert all(choice.reason for choice in prepared.choices.values())
    assert {"model.dtype", "train.device", "train.token_budget"} <= set(prepared.choices)


def test_weak_settings_are_named_and_not_changed(tiny_recipe: MakeRecipe) -> None:
    prepared = plan(tiny_recipe(train__learning_rate=5e-5))
    assert any("5e-05 is low for LoRA" in warning for warning in prepared.warnings)
    assert prepared.recipe.train.learning_rate == 5e-5


def test_a_tracker_that_is_not_installed_is_told_at_once(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="names wandb, which is not installed"):
        plan(tiny_recipe(train__report_to=["wandb"]))


def test_tensorboard_gets_losses_and_held_out_losses(tiny_recipe: MakeRecipe) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tiny_recipe(train__report_to=["tensorboard"], train__log_every=1)).run
    events = EventAccumulator(str(run.trackers))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    losses = [record["loss"] for record in run.read_metrics() if "loss" in record]
    assert logged == pytest.approx(losses, rel=1e-5)
    held_out = [record["eval_nll"] for record in run.read_metrics() if "eval_nll" in record]
    assert [event.value for event in events.Scalars("eval/nll")] == pytest.approx(held_out, rel=1e-5)
