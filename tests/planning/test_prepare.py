from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from loratune.planning import speed
from loratune.planning.hardware.measured import LAUNCH_SECONDS
from loratune.planning.preparation import Preparation
from loratune.recipe.recipe import Recipe
from loratune.run.errors import MachineError, RecipeError
from loratune.workflows.plan import plan
from loratune.workflows.train import train
from tests.conftest import write_jsonl

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
    from loratune.planning.memory import memory

    monkeypatch.setattr(memory, "PLANNABLE_FRACTION", 1e-6)
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
    assert any("5e-05 is low for LoRA" in advice.reason for advice in prepared.notes.advice)
    assert prepared.recipe.train.learning_rate == 5e-5


def test_the_four_presets_stand_side_by_side_and_the_chosen_one_is_the_run(tiny_recipe: MakeRecipe) -> None:
    prepared = plan(tiny_recipe())
    record = prepared.as_plan()
    assert list(record["presets"]) == ["minimal", "balanced", "attention", "complete"]
    chosen = record["presets"]["balanced"]
    assert chosen["trainable"] == record["parameters"]["trainable"]
    assert chosen["peak_bytes"] == record["memory"]["peak_bytes"]
    assert chosen["train_seconds"] == pytest.approx(record["time"]["train_seconds"])
    assert sum(item["trainable"] for item in record["parameters"]["per_module"]) == chosen["trainable"]
    sizes = [preset["trainable"] for preset in record["presets"].values()]
    assert sizes == sorted(sizes)


def test_a_named_device_gives_its_own_memory_time_and_type(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(model__dtype="auto")
    fast, slow = (plan(recipe, device=name) for name in ("h100-80gb", "l4"))
    assert fast.recipe.train.device == "cuda"
    assert fast.recipe.model.dtype == "bfloat16"
    assert fast.as_plan()["device"]["memory_bytes"] == 80 * 10**9
    assert fast.as_plan()["device"]["is_estimate"] is True
    assert fast.estimate.time.flops_per_second / slow.estimate.time.flops_per_second == pytest.approx(989 / 121)
    launches = 2 * speed.LAUNCHES["train"] * LAUNCH_SECONDS * fast.estimate.num_steps
    both = [made.estimate.time.train_seconds for made in (fast, slow)]
    assert both[0] == both[1] >= 0.8 * launches, "a tiny model waits for the host on either"
    assert plan(recipe).as_plan()["device"] is None
    assert not any("several times slower" in warning for warning in fast.notes.warnings)
    in_float32 = plan(tiny_recipe(model__dtype="float32"), device="l4")
    assert any(
        "model.dtype is float32, which is several times slower" in warning for warning in in_float32.notes.warnings
    )


def test_a_model_that_does_not_fit_the_named_device_is_refused(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.planning.hardware import devices

    small = dataclasses.replace(devices.DEVICES["l4"], memory_bytes=10**6)
    monkeypatch.setitem(devices.DEVICES, "l4", small)
    with pytest.raises(MachineError, match=r"one example of .* tokens needs .* 0.0 GiB are free"):
        plan(tiny_recipe(), device="l4")


def chat(*turns: str) -> dict[str, object]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}


def r1_plan(tiny_recipe: MakeRecipe, r1_model: Path, tmp_path: Path, rows: list[dict[str, object]]) -> Preparation:
    """The plan of a tiny model with the tokenizer of Qwen and the template of R1's distillations."""
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    return plan(tiny_recipe(model__name=str(r1_model), data__train=str(data), data__eval="none"))


@pytest.mark.slow
def test_r1_distill_tells_of_thoughts_put_back_and_of_answers_that_have_none(
    tiny_recipe: MakeRecipe, r1_model: Path, tmp_path: Path
) -> None:
    rows = [chat("2+2?", "<think>\nEasy.\n</think>\n\n4."), chat("3+3?", "6."), chat("4+4?", "<think>Eight. 8.")]
    prepared = r1_plan(tiny_recipe, r1_model, tmp_path, rows)
    warnings = "\n".join(prepared.notes.warnings)
    assert "The chat template drops the thoughts of 1 answer. They were put back" in warnings
    assert "generation prompt opens <think>, but 2 of 3 trained answers have no thoughts" in warnings
    assert "rows.jsonl:3 (message 2 (assistant) has 1 <think> and 0 </think>)" in warnings
    (advice,) = [advice for advice in prepared.notes.advice if advice.about == "chat template"]
    assert "2 of 3 compared prompts start the answer differently from training" in advice.reason
    assert "rows.jsonl:2" in advice.reason
    assert "'<｜Assistant｜>6.<｜end▁of▁sentence｜>'" in advice.reason
    assert "<｜Assistant｜><think>" in advice.reason


@pytest.mark.slow
def test_r1_distill_with_thoughts_throughout_needs_no_advice_about_its_template(
    tiny_recipe: MakeRecipe, r1_model: Path, tmp_path: Path
) -> None:
    rows = [chat(f"{n}+1?", f"<think>\nAdd {n}.\n</think>\n\n{n + 1}.") for n in range(4)]
    prepared = r1_plan(tiny_recipe, r1_model, tmp_path, rows)
    assert prepared.data.report["prompts"] == {
        "checked": 4,
        "header_differs": 0,
        "history_differs": 0,
        "boundary_differs": 0,
        "trained": "",
        "served": "",
    }
    assert not [advice for advice in prepared.notes.advice if advice.about in ("chat template", "data.thinking")]
    assert prepared.data.report["train"]["findings"] == []


def test_r1_distill_in_two_turns_tells_that_earlier_thoughts_are_gone_when_served(
    tiny_recipe: MakeRecipe, r1_model: Path, tmp_path: Path
) -> None:
    answer = "<think>\nEasy.\n</think>\n\n4."
    prepared = r1_plan(tiny_recipe, r1_model, tmp_path, [chat("2+2?", answer, "Sure?", answer)])
    (advice,) = [advice for advice in prepared.notes.advice if advice.about == "data.thinking"]
    assert "drop the thoughts of earlier answers" in advice.reason


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


def test_max_steps_overrides_the_epochs_and_whatever_depends_on_them(tiny_recipe: MakeRecipe) -> None:
    """20 examples in steps of 8: three steps an epoch."""
    by_steps = plan(tiny_recipe(train__max_steps=5, train__epochs=9))
    assert by_steps.estimate.num_steps == 5
    assert by_steps.recipe.train.epochs == pytest.approx(5 / 3)
    assert by_steps.choices["train.epochs"].reason == "train.max_steps is 5, which overrides 9"
    again = plan(Recipe.parse(by_steps.as_lock()["recipe"]))
    assert again.recipe == by_steps.recipe
    assert again.choices["train.epochs"].reason == "train.max_steps is 5"
    by_epochs = plan(tiny_recipe(train__epochs=5 / 3))
    assert by_epochs.estimate.num_steps == 5
    assert "train.epochs" not in by_epochs.choices
    assert plan(tiny_recipe(train__max_steps=6)).estimate.time.flops > by_steps.estimate.time.flops
    with pytest.raises(RecipeError, match="a run of 2 steps") as error:
        plan(tiny_recipe(train__max_steps=2, train__average_checkpoints=3))
    assert error.value.fix.startswith("train.max_steps=3, or")


def test_a_probe_takes_its_own_steps(tiny_recipe: MakeRecipe) -> None:
    assert plan(tiny_recipe(train__max_steps=1), probe=True).estimate.num_steps == 1
