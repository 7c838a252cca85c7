"""The names of other tools, answered with ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from loratune.recipe.other_names import NO_COUNTERPART, SETTINGS, VALUES, named_here
from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError

OURS = {
    f"{section}.{field}"
    for section, info in Recipe.model_fields.items()
    for field in info.annotation.model_fields  # type: ignore[union-attr]
}


def test_there_are_about_as_many_as_users_bring() -> None:
    assert len(SETTINGS) >= 80


@pytest.mark.parametrize("name", SETTINGS)
def test_each_name_is_answered_by_a_setting_that_exists(name: str) -> None:
    answer = SETTINGS[name]
    if answer.startswith(NO_COUNTERPART):
        assert len(answer) > 20, "says why"
        return
    ours, value = re.match(r"([a-z]+\.[a-z_]+)(?:=([^;]+))?", answer).groups()  # type: ignore[union-attr]
    assert ours in OURS
    assert ours.rpartition(".")[2] != name, "our own name needs no answer"
    if value and "{" not in value:
        section, _, field = ours.partition(".")
        needed = {"loftq": {"model": {"quantization": "nf4"}}}.get(value, {})
        values = [value.strip("[]")] if value.startswith("[") else value
        Recipe.parse({**needed, section: {field: values}})


@pytest.mark.parametrize(("setting", "theirs"), [(s, t) for s, values in VALUES.items() for t in values])
def test_each_value_is_answered_by_one_that_is_valid(setting: str, theirs: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{}")
    ours = VALUES[setting][theirs]
    needed = {"data.format": ["data.train_on=all"], "preference.loss": ["task=preference"]}
    Recipe.load(path, [f"{setting}={ours}", *(needed.get(setting, []) if ours in ("text", "dpo") else [])])
    with pytest.raises(RecipeError) as error:
        Recipe.load(path, [f"{setting}='{theirs}'"])
    assert error.value.fix.startswith(f"{setting}={ours}.")


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        ("train.lr=3", "here it is train.learning_rate"),
        ("lora.rank=8", "here it is lora.r"),
        ("lora.use_dora=true", "here it is lora.variant=dora"),
        ("lr=3", "here it is train.learning_rate"),
        ("train.packing=true", "not needed here: examples are always packed"),
    ],
)
def test_on_the_command_line_in_yaml_and_in_python(written: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{}")
    with pytest.raises(RecipeError) as told:
        Recipe.load(path, [written])
    assert told.value.fix.startswith(fix)
    name, _, value = written.partition("=")
    section, _, field = name.rpartition(".")
    path.write_text(f"{section}:\n  {field}: {value}\n" if section else f"{field}: {value}\n")
    with pytest.raises(RecipeError) as told:
        Recipe.load(path)
    assert told.value.fix.startswith(fix)
    assert told.value.line == (2 if section else 1)
    with pytest.raises(RecipeError) as told:
        Recipe.parse({section: {field: 3}} if section else {field: 3})
    assert told.value.fix.startswith(fix)


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        ({"max_steps": 10}, "here it is train.max_steps"),
        ({"train": {"r": 8}}, "here it is lora.r"),
        ({"train": {"iters": 8}}, "here it is train.max_steps; it counts optimizer steps"),
    ],
)
def test_our_own_name_in_the_wrong_place_is_answered_with_the_right_one(values: dict[str, Any], fix: str) -> None:
    with pytest.raises(RecipeError) as told:
        Recipe.parse(values)
    assert told.value.fix == fix


def test_a_misspelling_of_ours_is_still_answered_by_the_nearest_name(tmp_path: Path) -> None:
    assert not named_here("train.learning_rat")
    path = tmp_path / "r.yaml"
    path.write_text("train: {learning_rat: 3}")
    with pytest.raises(RecipeError, match="did you mean learning_rate"):
        Recipe.load(path)
