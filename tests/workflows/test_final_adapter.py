from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import Record, RunDir, write_json
from loratune.run.progress import NoProgress
from loratune.workflows.final_adapter import describe_final_adapter


@pytest.mark.parametrize(
    ("settings", "file", "expected"),
    [
        ({"train__final_adapter": "best"}, "best", {"kind": "best", "steps": [2]}),
        ({"train__final_adapter": "best"}, None, {"kind": "last", "steps": [6]}),
        ({}, "best", {"kind": "last", "steps": [6]}),
        ({"train__average_checkpoints": 2}, "mean", {"kind": "mean", "steps": [4, 6]}),
    ],
)
def test_the_record_says_which_steps_the_adapter_is_of(
    tiny_recipe: Callable[..., Recipe], settings: Record, file: str | None, expected: Record
) -> None:
    recipe = tiny_recipe(train__save_every=2, train__eval_every=2, **settings)
    run = RunDir.create(recipe.train.output_dir, overwrite=False)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 7)]
    run.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if file == "best":
        write_json(run.best, {"step": 2, "eval_nll": 0.5, "checkpoint": "checkpoints/2"})
    elif file == "mean":
        write_json(run.mean, {"steps": [4, 6]})
    assert describe_final_adapter(prepare(recipe, NoProgress()), run) == expected
