"""The mean of the last checkpoints: of which, how, and the same after a stop."""

from __future__ import annotations

import copy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from loratune.recipe.recipe import Recipe, TrainSection
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import Interrupted, RecipeError
from loratune.training.checkpoint import averaged_steps
from loratune.workflows.evaluate import evaluate
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.invariants.test_same_mathematics import assert_same
from tests.training.test_disk import Moment
from tests.training.test_signals import send

MakeRecipe = Callable[..., Recipe]
SETTINGS = {"train__average_checkpoints": 2, "train__save_every": 2, "train__keep_checkpoints": 1, "lora__dropout": 0.1}
NAME = "adapter_model.safetensors"


def averaged_by_torch(folders: list[Path]) -> dict[str, torch.Tensor]:
    """What torch's stochastic weight averaging makes of the adapters."""

    def module(folder: Path) -> nn.ParameterDict:
        return nn.ParameterDict({name.replace(".", "/"): weight for name, weight in load_file(folder / NAME).items()})

    average = AveragedModel(copy.deepcopy(module(folders[0])))
    for folder in folders:
        average.update_parameters(module(folder))
    return {name.replace("/", "."): weight.detach() for name, weight in average.module.items()}


def test_a_run_ends_with_the_mean_of_its_last_checkpoints(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(**SETTINGS)
    run = train(recipe).run
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["4", "6"], "one is kept, two are averaged"
    expected = averaged_by_torch([run.checkpoints / "4", run.checkpoints / "6"])
    adapter = load_file(run.adapter / NAME)
    assert adapter.keys() == expected.keys()
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-8)
    last = load_file(run.checkpoints / "6" / NAME)
    assert any(not weight.equal(last[name]) for name, weight in adapter.items())
    record = read_json(run.evaluation)
    assert record["adapter"] == {"kind": "mean", "steps": [4, 6]}
    held_out = [line["eval_nll"] for line in run.read_metrics() if "eval_nll" in line]
    assert record["tuned"]["nll"] != pytest.approx(held_out[-1], abs=1e-6), "that of the last step is another one"
    assert "the mean of the checkpoints of steps 4, 6" in run.report.read_text()
    again = evaluate(run.root).evaluation
    assert again is not None
    assert again["adapter"] == record["adapter"]
    assert again["tuned"]["nll"] == pytest.approx(record["tuned"]["nll"], abs=1e-6)


def test_a_tied_head_that_is_trained_whole_has_the_mean_too(tiny_recipe: MakeRecipe) -> None:
    run = train(tiny_recipe(**SETTINGS, lora__modules_to_save=["lm_head"])).run
    expected = averaged_by_torch([run.checkpoints / "4", run.checkpoints / "6"])
    adapter = load_file(run.adapter / NAME)
    tied = [name for name in adapter if "lm_head" in name or "embed_tokens" in name]
    assert len(tied) == 2, "saved under both names"
    (mean,) = [expected[name] for name in tied if name in expected]
    for name in tied:
        torch.testing.assert_close(adapter[name], mean, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_stop_between_checkpoints_changes_nothing(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = train(tiny_recipe(**SETTINGS)).run
    recipe = tiny_recipe(**SETTINGS, train__output_dir=str(tmp_path / "stopped"))
    with pytest.raises(Interrupted, match="stopped after step 5"):
        train(recipe, progress=Moment("training", send(signal.SIGINT), at=6))
    run = RunDir.open(recipe.train.output_dir)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["4", "5"]
    resume(run.root)
    assert_same(whole, run, tolerance=0)
    shutil.rmtree(run.adapter)  # killed before it was written
    resume(run.root)
    assert_same(whole, run, tolerance=0)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_and_left_out(tiny_recipe: MakeRecipe) -> None:
    run = train(tiny_recipe(**SETTINGS, train__eval_every="never")).run
    shutil.rmtree(run.adapter)
    (run.checkpoints / "4" / NAME).write_bytes(b"")
    listener = Moment("", lambda: None)
    resume(run.root, progress=listener)
    assert any("checkpoint 4 is damaged" in line and "left out of the mean" in line for line in listener.lines)
    assert (run.adapter / NAME).stat().st_size
    assert read_json(run.evaluation)["adapter"] == {"kind": "mean", "steps": [6]}


def test_only_what_the_cadence_wants_is_averaged() -> None:
    def steps(last_step: int, **settings: object) -> list[int]:
        section = TrainSection.model_validate({"average_checkpoints": 3, **settings})
        return averaged_steps(section, last_step=last_step, num_steps=10, num_per_epoch=4)

    assert steps(10, save_every=3) == [6, 9, 10]
    assert steps(10, save_every="epoch") == [4, 8, 10]
    assert steps(10, save_every=0.25) == [6, 9, 10]
    assert steps(7, save_every=3) == [3, 6, 7], "ended early"
    assert steps(10, average_checkpoints=None) == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"train__final_adapter": "best"}, "final_adapter is best"),
        ({"train__save_every": "never"}, "save_every is never"),
    ],
)
def test_what_leaves_nothing_to_average_is_refused(
    tiny_recipe: MakeRecipe, settings: dict[str, object], why: str
) -> None:
    with pytest.raises(RecipeError, match=rf"average_checkpoints is 2, but train\.{why}"):
        tiny_recipe(train__average_checkpoints=2, **settings)
