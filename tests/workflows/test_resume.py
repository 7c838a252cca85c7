from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.planning import prepare as preparing
from loratune.planning.lock import changed_inputs
from loratune.planning.preparation import Preparation
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows import steps
from loratune.workflows.resume import resume
from loratune.workflows.train import train


def test_the_lock_of_a_hub_model_knows_the_weights_that_are_fetched_after_the_plan(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `resume` would call them changed."""
    late: list[Path] = []

    def from_hub(recipe: Recipe, *args: Any) -> Preparation:
        prepared = prepare(recipe, *args)
        base = dataclasses.replace(prepared.model.base, revision="0" * 40)
        return dataclasses.replace(prepared, model=dataclasses.replace(prepared.model, base=base))

    def fetch(prepared: Preparation, progress: Any) -> Any:
        late.append(prepared.model.base.path / "fetched_with_the_weights.json")
        late[0].write_text("{}")
        return load(prepared, progress)

    load = steps.load_base
    monkeypatch.setattr(preparing, "prepare", from_hub)
    monkeypatch.setattr(steps, "load_base", fetch)
    recipe = tiny_recipe()
    try:
        run = train(recipe).run
        lock = read_json(run.lock)
        assert late[0].name in lock["inputs"]["model"]
        assert not changed_inputs(lock, from_hub(recipe, NoProgress()).as_lock())
    finally:
        late[0].unlink()


def test_a_finished_run_names_the_way_to_train_its_adapter_further(finished_run: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    with pytest.raises(RecipeError) as error:
        resume(run.root)
    assert error.value.problem == "the run is finished"
    command = error.value.fix.split("`")[1].split()
    assert command[:2] == ["loratune", "train"]
    prepared = prepare(Recipe.load(command[2], command[3:]), NoProgress())
    assert prepared.adapter.start == run.adapter

    run.recipe.write_text(run.recipe.read_text().replace("epochs: 6", "epochs: 9"))
    with pytest.raises(RecipeError, match=r"is not trained: train\.epochs \(6 → 9\)"):
        resume(run.root)


def test_a_run_that_torchrun_started_again_goes_on_in_its_log(
    finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    run.lock.write_text(json.dumps({**read_json(run.lock), "launch": "the same"}))
    before = run.log.read_text()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "the same")
    train(Recipe.load(run.recipe, [f"train.output_dir={run.root}"]))
    log = run.log.read_text()
    assert log.startswith(before)
    assert "all steps are done" in log[len(before) :]
