"""Every optimizer and every schedule: both engines, a resumed run, and the bytes that the plan promises."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from loratune.planning import checks
from loratune.planning.checks import check_optimizer
from loratune.recipe.recipe import Optimizer, Recipe, Schedule
from loratune.run.directory import read_json
from loratune.run.errors import MachineError, RecipeError
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import some
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
RATES = {"adamw": 1e-2, "adamw_8bit": 1e-2, "lion": 3e-3, "muon": 1e-2, "adafactor": 1e-2, "sgd": 1.0}
RANKS = {"adamw_8bit": 64}
"""Where the default of these tests is too small: matrices that are kept in 8 bits, and some that are not."""
TOLERANCES = {"muon": 3e-4, "adamw_8bit": 1e-4}
"""Newton-Schulz iterates in bfloat16: gradients that differ in their last bit make steps that differ by 2^-8 of
themselves. A moment in 8 bits may be rounded to its neighbor."""
OTHERS = [name for name in get_args(Optimizer) if name != "adamw"]
SCHEDULES = [name for name in get_args(Schedule) if name not in ("linear", "constant")]


@pytest.mark.parametrize("optimizer", some(OTHERS, "muon"))
def test_both_engines_take_the_same_steps(optimizer: str, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {
        "train__optimizer": optimizer,
        "train__learning_rate": RATES[optimizer],
        "train__weight_decay": 0.1,
        "lora__targets": "complete",
        "lora__r": RANKS.get(optimizer, 4),
    }
    fast = train(tiny_recipe(**settings)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=TOLERANCES.get(optimizer, 1e-5))


@pytest.mark.parametrize("schedule", some(SCHEDULES, "warmup_stable_decay"))
def test_both_engines_have_the_same_learning_rates(schedule: str, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"train__schedule": schedule, "train__warmup_fraction": 0.3}
    fast = train(tiny_recipe(**settings)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    some(
        [
            *(("adafactor", "cosine_with_min_lr"), ("sgd", "inverse_sqrt"), ("adamw", "warmup_stable_decay")),
            *(("adamw_8bit", "cosine"), ("lion", "linear"), ("muon", "linear")),
        ],
        ("adamw_8bit", "cosine"),
    ),
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    optimizer: str, schedule: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = {
        "train__optimizer": optimizer,
        "train__schedule": schedule,
        "train__warmup_fraction": 0.2,
        "train__learning_rate": RATES[optimizer],
        "train__save_every": 2,
        "lora__dropout": 0.1,
        "lora__r": RANKS.get(optimizer, 4),
    }
    whole = train(tiny_recipe(**settings)).run
    killed = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "part"))).run
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / "6")
    assert_same(whole, resume(killed.root).run, tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "optimizer"), some([("plain", "adamw"), ("dora", "adafactor")], ("plain", "adamw"))
)
def test_lora_plus_is_the_same_in_both_engines_and_after_resuming(
    variant: str, optimizer: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = {
        "lora__variant": variant,
        "train__optimizer": optimizer,
        "train__learning_rate": 2e-3,
        "train__lora_plus_ratio": 8.0,
        "train__weight_decay": 0.1,
        "train__save_every": 2,
    }
    fast = train(tiny_recipe(**settings)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    before = {path: path.read_bytes() for path in fast.adapter.glob("*.safetensors")}
    shutil.rmtree(fast.adapter)
    shutil.rmtree(fast.checkpoints / "6")
    resume(fast.root)
    assert {path: path.read_bytes() for path in before} == before


def test_lora_plus_moves_b_by_the_ratio_and_a_as_before(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """AdamW's first step is the learning rate, whatever the gradient: without B's, A has none, so only B moves."""
    settings = {"train__epochs": 0.1, "train__max_grad_norm": 0.0, "train__learning_rate": 1e-3}

    def adapter(name: str, ratio: float) -> dict[str, torch.Tensor]:
        made = tiny_recipe(**settings, train__lora_plus_ratio=ratio, train__output_dir=str(tmp_path / name))
        return load_file(train(made).run.adapter / "adapter_model.safetensors")

    plain, faster = adapter("plain", 1.0), adapter("faster", 4.0)
    for name, weight in plain.items():
        if "lora_A" in name:
            torch.testing.assert_close(faster[name], weight, rtol=0, atol=0)
        else:
            torch.testing.assert_close(faster[name], 4 * weight)
            assert float(weight.abs().max()) > 5e-4


@pytest.mark.parametrize(
    ("optimizer", "variant"),
    some(
        [
            (name, kind)
            for name in get_args(Optimizer)
            for kind in ("plain", "dora")
            if (name, kind) != ("muon", "dora")
        ],
        *(("adamw", "plain"), ("adamw_8bit", "dora"), ("adafactor", "dora"), ("lion", "plain")),
    ),
)
def test_the_plan_counts_what_the_optimizer_keeps(optimizer: str, variant: str, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(
        train__optimizer=optimizer,
        train__epochs=0.4,
        lora__targets="complete",
        lora__variant=variant,
        lora__r=RANKS.get(optimizer, 4),
    )
    run = train(recipe).run
    (checkpoint,) = run.checkpoints.iterdir()
    state = load_file(checkpoint / "optimizer.safetensors").values()
    kept = sum(tensor.nbytes for tensor in state if tensor.dim())  # counters have no dimension
    assert kept == read_json(run.plan)["memory"]["optimizer_bytes"]
    assert bool(kept) == (optimizer != "sgd")


def test_muon_makes_orthogonal_steps_at_rates_of_adamw(tiny_recipe: MakeRecipe) -> None:
    """The first step moves B alone, by 0.2 · rate · √(its larger side) times a matrix whose singular values are about
    1."""
    rate = 1e-3
    run = train(
        tiny_recipe(
            train__optimizer="muon",
            train__epochs=0.1,
            train__learning_rate=rate,
            train__schedule="constant",
            lora__targets="complete",
        )
    ).run
    moved = [w for name, w in load_file(run.adapter_weights).items() if "lora_B" in name]
    assert len(moved) == 14
    for weight in moved:
        scale = 0.2 * rate * max(weight.shape) ** 0.5
        values = torch.linalg.svdvals(weight) / scale
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3


def test_what_an_optimizer_cannot_do_is_refused(tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="whose magnitudes are vectors"):
        tiny_recipe(train__optimizer="muon", lora__variant="dora")
    recipe = tiny_recipe(train__optimizer="lion")
    with pytest.raises(MachineError, match=r"lion, which bitsandbytes runs on CUDA and CPUs only"):
        check_optimizer(recipe, "mps", is_here=True)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"lion, but bitsandbytes is not installed"):
        check_optimizer(recipe, "cpu", is_here=True)
    check_optimizer(recipe, "cuda", is_here=False)
    check_optimizer(tiny_recipe(), "mps", is_here=True)


def test_eight_bits_stay_near_thirty_two(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"lora__targets": "complete", "lora__r": 64, "train__learning_rate": 1e-3}
    eight = train(tiny_recipe(**settings, train__optimizer="adamw_8bit")).run
    plain = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "plain"))).run
    losses, expected = ([line["loss"] for line in run.read_metrics() if "loss" in line] for run in (eight, plain))
    assert losses == pytest.approx(expected, abs=0.02)
    assert losses != expected
    checkpoint = max(eight.checkpoints.iterdir(), key=lambda path: int(path.name))
    kinds = {tensor.dtype for tensor in load_file(checkpoint / "optimizer.safetensors").values()}
    assert kinds == {torch.uint8, torch.float32}


@pytest.mark.parametrize(
    ("name", "value"),
    [("modules_to_save", ["norm"]), ("new_tokens", ["<|tool|>"]), ("target_parameters", ["mlp.experts.down_proj"])],
)
def test_muon_is_for_the_matrices_of_an_adapter_alone(tiny_recipe: MakeRecipe, name: str, value: list[str]) -> None:
    with pytest.raises(RecipeError, match=f"muon, which trains the adapter's matrices only, but lora.{name} is set"):
        tiny_recipe(train__optimizer="muon", **{f"lora__{name}": value})
