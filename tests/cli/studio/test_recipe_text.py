"""The form drives the text: one setting changes, and nothing else does."""

from __future__ import annotations

import difflib
from typing import Any

import pytest
import yaml

from loratune.cli.studio.recipe_text import MAIN, form_of, set_field
from loratune.recipe.recipe import Recipe
from loratune.recipe.yaml import read_settings
from loratune.run.errors import RecipeError


def read_text(text: str) -> dict[str, Any]:
    return read_settings(text, None)[0]


TEXT = """# A recipe.
model:
  name: folder  # the base

data:
  train:
    - name: a.jsonl
      weight: 2  # twice
    - b.jsonl
  # held out
  eval: 0.05
lora: {r: 4}
train:
  learning_rate: 0.0002
"""


@pytest.mark.parametrize(
    ("name", "value", "before", "after"),
    [
        ("train.learning_rate", "1e-4", "  learning_rate: 0.0002", "  learning_rate: 0.0001"),
        ("model.name", '"other: one"', "  name: folder  # the base", "  name: 'other: one'  # the base"),
        ("data.eval", "none", "  eval: 0.05", "  eval: none"),
    ],
)
def test_a_setting_changes_in_its_place(name: str, value: str, before: str, after: str) -> None:
    text = set_field(TEXT, name, value)
    changes = [line for line in difflib.ndiff(TEXT.splitlines(), text.splitlines()) if line[0] in "+-"]
    assert changes == [f"- {before}", f"+ {after}"]


def test_a_list_is_replaced_as_a_whole_and_new_settings_go_to_the_end_of_their_section() -> None:
    text = set_field(TEXT, "data.train", "c.csv")
    assert "  train: c.csv\n  # held out\n  eval: 0.05" in text
    text = set_field(set_field(text, "train.epochs", "2"), "evaluate.samples", "5")
    assert read_text(text)["train"] == {"learning_rate": 0.0002, "epochs": 2}
    assert read_text(text)["evaluate"] == {"samples": 5}
    assert text.startswith("# A recipe.\n")
    assert set_field("", "model.name", "a") == "model:\n  name: a\n"


def test_what_cannot_be_edited_in_place_is_written_out_with_the_same_settings() -> None:
    text = set_field(TEXT, "lora.r", "8")  # its section stands on one line
    assert read_text(text) == {**read_text(TEXT), "lora": {"r": 8}}


def test_an_empty_field_is_the_default() -> None:
    text = set_field(TEXT, "train.learning_rate", " ")
    assert Recipe.parse(read_text(text), file="x").train.learning_rate == Recipe().train.learning_rate


def test_a_value_cannot_smuggle_in_other_settings() -> None:
    text = set_field(TEXT, "model.name", "a\ntrain: {epochs: 99}")
    assert read_text(text)["train"] == {"learning_rate": 0.0002}
    assert set(read_text(text)) == set(read_text(TEXT))


def test_every_field_of_the_schema_is_in_the_form_once_with_its_description() -> None:
    main, rest = form_of(TEXT)
    names = [field.name for part in (main, *rest.values()) for field in part]
    declared = [f"{s}.{f}" for s, info in Recipe.model_fields.items() if s != "preference" for f in _fields(info)]
    assert sorted(names) == sorted(declared)
    assert [field.name for field in main] == list(MAIN)
    fields = {field.name: field for part in (main, *rest.values()) for field in part}
    assert all(field.description for field in fields.values())
    assert (fields["lora.r"].value, fields["lora.r"].default, fields["train.epochs"].value) == ("4", "16", "")
    assert fields["train.optimizer"].closed
    assert "muon" in fields["train.optimizer"].choices
    assert not fields["lora.targets"].closed, "a list of names is possible"
    assert fields["model.trust_remote_code"].choices == ("true", "false")


def _fields(info: object) -> list[str]:
    return list(info.annotation.model_fields)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["a: [", "- a", "&a [*a, *a", "just text"])
def test_a_text_that_is_no_recipe_is_an_error_that_can_be_shown(text: str) -> None:
    with pytest.raises(RecipeError):
        form_of(text)
    with pytest.raises(RecipeError):
        set_field(text, "lora.r", "8")


def test_an_unknown_setting_is_refused() -> None:
    for name in ("lora.rank", "nothing.r", "lora", ""):
        with pytest.raises(RecipeError, match="is not a setting"):
            set_field(TEXT, name, "1")


def test_each_main_field_takes_its_own_default() -> None:
    for name in MAIN:
        assert yaml.safe_load(set_field(TEXT, name, ""))
