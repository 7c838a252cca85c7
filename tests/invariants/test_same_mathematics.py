"""The recipe decides the mathematics: engines, token budgets and packing must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratune.model.device import cpp_compiler
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.training import fast_trainer, loss
from loratune.workflows.train import train
from tests.conftest import some

MakeRecipe = Callable[..., Recipe]


def trajectory(run: RunDir) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, held-out losses, final adapter."""
    metrics = run.read_metrics()
    losses = [record["loss"] for record in metrics if "loss" in record]
    held_out = [record["eval_nll"] for record in metrics if "eval_nll" in record]
    return losses, held_out, load_file(run.adapter / "adapter_model.safetensors")


def assert_same(one: RunDir, other: RunDir, *, tolerance: float) -> None:
    losses, held_out, adapter = trajectory(one)
    other_losses, other_held_out, other_adapter = trajectory(other)
    assert losses == pytest.approx(other_losses, abs=tolerance)
    assert held_out == pytest.approx(other_held_out, abs=tolerance)
    assert adapter.keys() == other_adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, other_adapter[name], rtol=0, atol=10 * tolerance)
    assert max(float(tensor.abs().max()) for name, tensor in adapter.items() if "lora_B" in name) > 1e-3


# float32: a loss of 10 nats is known to 1e-6; Adam divides gradients by their size, so weights differ a little more
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_the_fast_engine_takes_the_steps_of_stock_trl(tiny_recipe: MakeRecipe, tmp_path: Path, train_on: str) -> None:
    fast = train(tiny_recipe(data__train_on=train_on, lora__targets="complete"))
    stock = train(
        tiny_recipe(
            data__train_on=train_on,
            lora__targets="complete",
            train__engine="trl",
            train__output_dir=str(tmp_path / "trl"),
        )
    )
    assert_same(fast.run, stock.run, tolerance=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora__targets": "complete"},
        {"train__neftune_noise_alpha": 20.0},
        {"lora__variant": "dora"},
        {"lora__targets": "complete", "train__recompute": 2},
    ],
    ids=["complete", "noise", "dora", "recomputed"],
)
@pytest.mark.parametrize("budget", some([1, 64, 4096], 1))
def test_the_token_budget_does_not_change_the_result(
    tiny_recipe: MakeRecipe, tmp_path: Path, budget: int, settings: dict[str, object]
) -> None:
    """Dropout and noise included, in PEFT's own forward too."""
    settings = {"lora__dropout": 0.05, **settings}
    one = train(tiny_recipe(**settings))
    other = train(tiny_recipe(**settings, train__token_budget=budget, train__output_dir=str(tmp_path / "other")))
    assert_same(one.run, other.run, tolerance=1e-5)


def test_another_seed_drops_otherwise(tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above could fail: the same order and the same beginning, only other masks."""
    one = train(tiny_recipe(lora__dropout=0.05, lora__targets="complete")).run
    real = fast_trainer.row_numbers
    monkeypatch.setattr(fast_trainer, "row_numbers", lambda seed, *rest: real(seed + 1, *rest))
    settings = {"lora__dropout": 0.05, "lora__targets": "complete", "train__output_dir": str(tmp_path / "other")}
    other = train(tiny_recipe(**settings)).run
    differences = [abs(a - b) for a, b in zip(trajectory(one)[0], trajectory(other)[0], strict=True)]
    assert max(differences) > 1e-4


def test_examples_that_go_through_the_model_one_at_a_time_are_dropped_as_packed_ones(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed too: by the backward pass, the last example has had its forward."""
    settings = {"lora__dropout": 0.05, "lora__targets": "complete"}
    packed = train(tiny_recipe(**settings)).run
    monkeypatch.setattr(loss, "obstacle", lambda model: "said so")
    for layers in (0, 2):
        folder = str(tmp_path / f"alone-{layers}")
        alone = train(tiny_recipe(**settings, train__recompute=layers, train__output_dir=folder)).run
        assert_same(packed, alone, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: torch.compile needs one on a CPU")
def test_compiled_layers_drop_as_eager_ones_do(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"lora__dropout": 0.05, "lora__targets": "complete"}
    eager = train(tiny_recipe(**settings, train__compile=False)).run
    for budget in (64, 4096):
        folder = {"train__output_dir": str(tmp_path / str(budget)), "train__token_budget": budget}
        assert_same(eager, train(tiny_recipe(**settings, **folder, train__compile=True)).run, tolerance=1e-5)


@pytest.mark.parametrize("layers", some([1, 2], 2))
def test_recomputed_layers_give_the_same_gradients_with_the_same_dropout(
    tiny_recipe: MakeRecipe, tmp_path: Path, layers: int
) -> None:
    one = train(tiny_recipe(lora__dropout=0.1, lora__targets="complete", train__recompute=0))
    other = train(
        tiny_recipe(
            lora__dropout=0.1,
            lora__targets="complete",
            train__recompute=layers,
            train__output_dir=str(tmp_path / "other"),
        )
    )
    assert_same(one.run, other.run, tolerance=0)


# One compilation serves all: the compiled layer is kept for the process.
@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: torch.compile needs one on a CPU")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_take_the_same_steps(tiny_recipe: MakeRecipe, tmp_path: Path, dtype: str) -> None:
    """Against the eager fast engine and stock TRL, with any token budget."""

    def run(name: str, **settings: object) -> RunDir:
        made = tiny_recipe(
            model__dtype=dtype,
            lora__targets="complete",
            train__learning_rate=1e-3,
            train__output_dir=str(tmp_path / name),
            **settings,
        )
        return train(made).run

    compiled = run("compiled", train__compile=True)
    eager = run("eager", train__compile=False)
    small = run("small", train__compile=True, train__token_budget=100)
    stock = run("stock", train__engine="trl")
    if dtype == "float32":
        for other in (eager, small, stock):
            assert_same(compiled, other, tolerance=1e-5)
        return
    # bfloat16: a token's loss is known to about 2^-8 of itself, a mean of hundreds of them ten times better
    reference = trajectory(stock)[0]
    for other in (compiled, eager, small):
        assert trajectory(other)[0] == pytest.approx(reference, rel=2**-9)


def test_the_same_recipe_twice_is_the_same_to_the_bit(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    one = train(tiny_recipe(lora__dropout=0.1))
    other = train(tiny_recipe(lora__dropout=0.1, train__output_dir=str(tmp_path / "other")))
    assert_same(one.run, other.run, tolerance=0)


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.training.step_dataset import StepDataset
    from loratune.workflows.resume import resume

    whole = train(tiny_recipe(lora__dropout=0.1, train__save_every=2))
    part = tiny_recipe(lora__dropout=0.1, train__save_every=2, train__output_dir=str(tmp_path / "part"))
    killed = train(part)
    # what a kill after step 4 leaves behind: later checkpoints and the adapter do not exist
    import shutil

    shutil.rmtree(killed.run.adapter)
    shutil.rmtree(killed.run.checkpoints / "6")
    asked: list[int] = []
    get = StepDataset.__getitem__
    monkeypatch.setattr(StepDataset, "__getitem__", lambda self, number: (asked.append(number), get(self, number))[1])
    resumed = resume(killed.run.root)
    assert set(asked) == {4, 5}, "no step before is read or skipped over"
    assert_same(whole.run, resumed.run, tolerance=0)
    steps = [record["step"] for record in resumed.run.read_metrics() if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]
