"""What counts as a change of the model between a run's start and `resume`."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.planning.lock import changed_inputs, model_fingerprint
from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError, Terminated
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.training.test_disk import Moment
from tests.training.test_signals import send


def test_added_removed_and_changed_files_are_differences(tmp_path: Path) -> None:
    for name in ("config.json", "removed.json", "changed.json"):
        (tmp_path / name).write_text("{}")
    before = {"inputs": {"model": model_fingerprint(tmp_path)}}
    (tmp_path / "removed.json").unlink()
    (tmp_path / "changed.json").write_text("[]")
    (tmp_path / "added.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("decides nothing")
    now = {"inputs": {"model": model_fingerprint(tmp_path)}}
    assert changed_inputs(before, now) == [f"inputs.model.{name}.json" for name in ("added", "changed", "removed")]


def test_a_run_does_not_resume_on_a_model_with_more_files(
    tiny_recipe: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    recipe = tiny_recipe(model__name=str(model))
    with pytest.raises(Terminated):
        train(recipe, progress=Moment("training", send(signal.SIGTERM), at=3))
    added = model / "added.json"
    added.write_text("{}")
    with pytest.raises(RecipeError, match=r"inputs\.model\.added\.json"):
        resume(recipe.train.output_dir)
    added.unlink()
    resume(recipe.train.output_dir)
