"""The number of processes decides the speed only: real torchrun processes on a CPU, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from loratune.pipeline import train
from loratune.recipe import Recipe
from loratune.run import RunDir, read_json
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
SETTINGS = {"train__token_budget": 150, "train__save_every": 2, "train__eval_every": 2, "lora__targets": "complete"}
"""Several micro-batches in a step; with 20 examples and a batch of 8 the last step of an epoch has 4."""


def write_recipe(recipe: Recipe, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    return path


def torchrun(number: int, arguments: Sequence[object], options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`torchrun … -m loratune …`."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}", *options, "-m", "loratune"]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def trained(number: int, recipe: Recipe, folder: Path) -> RunDir:
    """The run of so many processes."""
    name = f"{number}-processes"
    moved = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"output_dir": str(folder / name)})}, deep=True
    )
    done = torchrun(number, ["train", write_recipe(moved, folder / f"{name}.yaml")])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("loading ") == 1, "one process talks"
    return RunDir.open(folder / name)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_take_the_steps_of_one(tiny_recipe: MakeRecipe, tmp_path: Path, number: int) -> None:
    recipe = tiny_recipe(**SETTINGS, evaluate__metric="exact_match", evaluate__max_new_tokens=4)
    one = train(recipe)
    other = trained(number, recipe, tmp_path)
    assert_same(one.run, other, tolerance=1e-5)
    same = ("step", "num_tokens", "num_supervised_tokens")
    assert [[r.get(k) for k in same] for r in other.read_metrics()] == [
        [r.get(k) for k in same] for r in one.run.read_metrics()
    ]
    assert one.evaluation is not None
    measured = read_json(other.evaluation)
    for name in ("base", "tuned"):
        assert measured[name]["nll"] == pytest.approx(one.evaluation[name]["nll"], abs=1e-5)
    assert read_json(other.plan)["num_processes"] == number
    assert read_json(other.lock)["machine"]["processes"] == number
    assert other.is_complete
