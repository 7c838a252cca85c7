"""The same inputs give the same adapter, and other inputs are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import RecipeError
from loratune.workflows.reproduce import compare_adapters, reproduce
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [conversation(i) for i in range(12)])


@pytest.fixture
def run(tiny_recipe: MakeRecipe, rows: Path) -> RunDir:
    return train(tiny_recipe(data__train=str(rows), lora__dropout=0.2)).run


def test_a_run_is_reproduced_to_the_bit(run: RunDir, tmp_path: Path) -> None:
    result = reproduce(run.root)
    assert result.equal
    assert result.run.root == tmp_path / "run-again"
    assert (result.largest_difference, result.num_different) == (0.0, 0)
    assert result.run.recipe.read_text() == run.recipe.read_text()
    one, other = read_json(run.lock), read_json(result.run.lock)
    assert one["inputs"] == other["inputs"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("row", "inputs.train.tokens"),
        pytest.param("template", "inputs.template", marks=pytest.mark.slow),
        pytest.param("model", "inputs.model.model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_changed_input_is_refused_by_name_and_nothing_is_written(
    change: str, name: str, run: RunDir, rows: Path, tmp_path: Path
) -> None:
    lock = read_json(run.lock)
    if change == "row":
        rows.write_text(rows.read_text().replace("thing 3", "thing 4"))
    elif change == "template":
        lock["inputs"]["template"] = "0" * 64
    else:
        lock["inputs"]["model"]["model.safetensors"] = "0" * 64
    write_json(run.lock, lock)
    with pytest.raises(RecipeError, match="changed since the run") as error:
        reproduce(run.root)
    assert name in error.value.problem
    assert not (tmp_path / "run-again").exists()


def test_an_unfinished_run_and_its_own_place_are_refused(run: RunDir) -> None:
    with pytest.raises(RecipeError, match="would overwrite the old one"):
        reproduce(run.root, run.root)
    (run.adapter / "adapter_config.json").unlink()
    with pytest.raises(RecipeError, match="no adapter yet"):
        reproduce(run.root)


def test_one_other_weight_is_found_and_measured(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    other.adapter.mkdir(parents=True)
    weights = load_file(run.adapter_weights)
    first = next(iter(weights))
    weights[first][0, 0] += 0.25
    save_file(weights, other.adapter_weights)
    result = compare_adapters(run, other)
    assert not result.equal
    assert result.num_different == 1
    assert result.largest_difference == pytest.approx(0.25, abs=1e-6)
    assert "1 of 896 weights" in str(result.as_error())
    assert result.as_error().exit_code == 1
