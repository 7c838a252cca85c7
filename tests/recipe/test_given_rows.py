"""Rows from Python in place of a file."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from loratune.data.rows.sources import read_rows
from loratune.recipe.given_rows import missing_rows_fix, rows_folder
from loratune.recipe.recipe import Recipe, Source
from loratune.run.cache_folder import CACHE_VARIABLE, cache_dir
from loratune.run.errors import DataError, MachineError, RecipeError

ROWS: list[dict[str, Any]] = [{"prompt": f"Grün {i}?", "completion": f"Nº {i}", "n": i} for i in range(3)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "rows", [ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS), pd.DataFrame(ROWS)], ids=["list", "tuple", "hf", "pd"]
)
def test_rows_become_a_file_that_holds_them_and_is_named_after_them(rows: Any) -> None:
    recipe = Recipe(data={"train": rows, "eval": rows, "train_on": "all"}, evaluate={"forgetting": rows})
    (source,) = recipe.data.train
    assert Path(source.name).parent == rows_folder() == cache_dir() / "rows"
    assert [row.value for row in read_rows(source)] == ROWS
    assert recipe.data.eval == recipe.evaluate.forgetting == (source,)
    assert Recipe(data={"train": rows}).data.train == Recipe.parse({"data": {"train": rows}}).data.train == (source,)
    assert Recipe().replace(data={"train": rows}).data.train == (source,)
    assert [path.name for path in rows_folder().iterdir()] == [Path(source.name).name]
    assert Recipe(data={"train": ROWS[:2]}).data.train != (source,)


def test_a_table_is_read_without_the_nulls_that_its_columns_fill_in() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "thinking": "A greeting."}]
    (source,) = Recipe(data={"train": datasets.Dataset.from_list([{"messages": messages}])}).data.train
    assert read_rows(source)[0].value == {"messages": messages}


def test_rows_stand_among_other_sources_and_have_weights() -> None:
    recipe = Recipe(data={"train": [{"name": ROWS, "weight": 2}, "other.jsonl", datasets.Dataset.from_list(ROWS)]})
    names = [source.name for source in recipe.data.train]
    assert [Path(name).suffix for name in names] == [".jsonl", ".jsonl", ".parquet"]
    assert [source.weight for source in recipe.data.train] == [2, 1, 1]
    assert len(read_rows(recipe.data.train[0])) == 6


def test_a_misspelt_source_is_not_taken_for_a_row(cache: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown setting data\.train\.0\.nmae") as error:
        Recipe(data={"train": [{"nmae": "x.jsonl"}]})
    assert error.value.fix == "did you mean name?"
    assert not cache.exists()


def test_a_recipe_file_has_no_rows_in_it(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"data": {"train": ROWS}}))
    with pytest.raises(RecipeError, match=r"unknown setting data\.train\.0\.prompt"):
        Recipe.load(path)
    assert not cache.exists()


@pytest.mark.parametrize("value", [dt.date(2026, 1, 2), float("nan"), b"bytes"])
def test_what_json_has_not_is_refused_with_the_number_of_its_row(value: Any) -> None:
    with pytest.raises(DataError, match=r"row 2 of data\.train cannot be written as JSON"):
        Recipe(data={"train": [ROWS[0], {"prompt": value}]})


def test_a_table_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.eval cannot be written as Parquet"):
        Recipe(data={"eval": pd.DataFrame({"a": [1, "one", object()]})})


def test_a_full_disk_is_an_error_of_the_machine(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(MachineError, match="cannot write the rows") as error:
        Recipe(data={"train": ROWS})
    assert "LORATUNE_CACHE" in error.value.fix


def test_deleted_rows_are_written_again_by_the_same_recipe(tmp_path: Path) -> None:
    source = Recipe(data={"train": ROWS}).data.train[0]
    Path(source.name).unlink()
    with pytest.raises(DataError, match="no such file") as error:
        read_rows(source)
    assert error.value.fix.startswith("these rows were given from Python")
    Recipe(data={"train": ROWS})
    assert len(read_rows(source)) == 3
    assert not missing_rows_fix(tmp_path / "rows" / "train.jsonl")
    with pytest.raises(DataError) as error:
        read_rows(Source(name=str(tmp_path / "train.jsonl")))
    assert error.value.fix.startswith("check the path")


@pytest.mark.parametrize(
    ("sections", "problem", "fix"),
    [
        ({"train": {"lr": 3}}, "unknown setting train.lr", "here it is train.learning_rate"),
        ({"trian": {}}, "unknown setting trian", "did you mean train?"),
        ({"train": {"epochs": "many"}}, "train.epochs is 'many'", "For example train.epochs=3"),
        ({"data": {"eval": "none"}, "evaluate": {"metric": "json"}}, "evaluate.metric is json, but", "data.eval=0.1"),
        ({"train": 3}, "train is 3", ""),
        ({"task": "sequence_classification", "model": {"task": "causal_lm"}}, "task and model.task", "remove one"),
        ({"model": {"name": "hf_" + "a" * 34}}, "the recipe contains a Hub token", "remove it"),
    ],
)
def test_keywords_are_answered_as_yaml_is(sections: dict[str, Any], problem: str, fix: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe(**sections)
    assert error.value.problem.startswith(problem)
    assert error.value.fix.startswith(fix)
    assert "pydantic" not in str(error.value)


def test_keywords_make_the_recipe_that_yaml_makes() -> None:
    sections: dict[str, Any] = {"task": "sequence_classification", "data": {"train": "x.csv"}, "lora": {"r": 8}}
    assert Recipe(**sections) == Recipe.parse(sections)
    assert Recipe(lora=Recipe(**sections).lora).lora.r == 8
