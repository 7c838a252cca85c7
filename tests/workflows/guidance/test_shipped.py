"""The recipes and rows that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.errors import MachineError
from loratune.workflows.guidance import shipped
from loratune.workflows.guidance.shipped import copy_rows, missing_rows, shipped_recipes

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_rows_of_every_shipped_recipe_come_along(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(shipped_recipes()[name])
    assert missing_rows(recipe) == []
    copied = copy_rows(recipe)
    for path in copied:
        assert path.read_bytes() == (ROOT / path).read_bytes()
    assert (name in ("quickstart", "classify", "e2e", "preference")) == bool(copied)
    assert copy_rows(recipe) == [], "what is there is left alone"


def test_rows_that_are_nowhere_are_named_and_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(shipped_recipes()["quickstart"])
    (tmp_path / "examples").write_text("in the way")
    with pytest.raises(MachineError, match="cannot write"):
        copy_rows(recipe)
    monkeypatch.setattr(shipped, "_folder", lambda name: tmp_path / "empty" / name)
    assert missing_rows(recipe) == ["examples/quickstart/train.jsonl", "examples/quickstart/eval.jsonl"]
