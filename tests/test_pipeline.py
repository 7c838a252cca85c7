from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune import joint_preparation, pipeline
from loratune.lock import differences
from loratune.preparation import Preparation, prepare
from loratune.recipe import Recipe
from loratune.run import read_json


def test_the_lock_of_a_hub_model_knows_the_weights_that_are_fetched_after_the_plan(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `resume` would call them changed."""
    late: list[Path] = []

    def from_hub(recipe: Recipe, *args: Any) -> Preparation:
        prepared = prepare(recipe, *args)
        return dataclasses.replace(prepared, base=dataclasses.replace(prepared.base, revision="0" * 40))

    def fetch(prepared: Preparation, progress: Any) -> Any:
        late.append(prepared.base.path / "fetched_with_the_weights.json")
        late[0].write_text("{}")
        return load(prepared, progress)

    load = pipeline.load_base
    monkeypatch.setattr(joint_preparation, "prepare", from_hub)
    monkeypatch.setattr(pipeline, "load_base", fetch)
    recipe = tiny_recipe()
    try:
        run = pipeline.train(recipe).run
        lock = read_json(run.lock)
        assert late[0].name in lock["inputs"]["model"]
        assert not differences(lock, from_hub(recipe, pipeline.Silent()).as_lock())
    finally:
        late[0].unlink()
