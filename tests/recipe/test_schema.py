"""The JSON schema, tried on recipes as a careful editor would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from loratune.recipe.recipe import Recipe
from loratune.recipe.schema import recipe_schema
from loratune.recipe.yaml import read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SCHEMA = Draft202012Validator(recipe_schema())


def written(path: Path) -> dict[str, Any]:
    """What the file says, as JSON, with `task` where it stands."""
    values, _ = read_yaml(path)
    if "task" in yaml.safe_load(path.read_text()):
        values = {"task": values["model"].pop("task"), **values}
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_as_written_and_with_every_setting(path: Path) -> None:
    SCHEMA.validate(written(path))
    SCHEMA.validate(Recipe.load(path).model_dump(mode="json"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora": {"rank": 8}},
        {"trian": {"epochs": 1}},
        {"data": {"train": {"nmae": "a.jsonl"}}},
        {"data": {"train": 7}},
        {"data": {"eval": True}},
        {"task": "translation"},
        {"evaluate": {"metric": "f1"}},
        {"train": {"epochs": "three"}},
    ],
    ids=json.dumps,
)
def test_what_the_recipe_refuses_the_schema_refuses(wrong: dict[str, Any]) -> None:
    assert not SCHEMA.is_valid(wrong)


@pytest.mark.parametrize(
    "data",
    [
        {"train": "a.jsonl", "eval": 0.1},
        {"train": ["a.jsonl", {"name": "b.csv", "weight": 2}], "eval": "none"},
        {"train": {"name": "org/set", "split": "train"}, "eval": ["c.jsonl"]},
    ],
    ids=json.dumps,
)
def test_sources_may_be_names_records_and_lists(data: dict[str, Any]) -> None:
    SCHEMA.validate({"data": data})
    Recipe.parse({"data": data})
