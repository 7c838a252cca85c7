from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe, Source, origins
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.guidance.explain import (
    Explanation,
    all_fields,
    explain,
    explanation_page,
    explanation_table,
    full_name,
    shown_value,
)


def explained(path: Path, overrides: list[str], fields: tuple[str, ...] = ()) -> dict[str, Explanation]:
    recipe = Recipe.load(path, overrides)
    found: Any = explain(recipe, prepare(recipe, NoProgress()), origins(path, overrides), fields)
    assert all(f"<tr><td>{item.name}</td>" in found._repr_html_() for item in found), "what a notebook shows"
    return {item.name: item for item in found}


def test_every_setting_has_its_exact_origin(recipe_file: Path) -> None:
    found = explained(recipe_file, ["lora.alpha=8", "train.batch_size=2"])
    assert list(found) == all_fields()
    lines = recipe_file.read_text().splitlines()
    for name, item in found.items():
        if name in ("lora.alpha", "train.batch_size"):
            assert item.origin == "command line"
        elif item.origin != "default":
            file, _, line = item.origin.rpartition(":")
            assert file == str(recipe_file)
            assert name.partition(".")[2] in lines[int(line) - 1]
    given = {name for name, item in found.items() if item.origin.startswith(str(recipe_file))}
    assert given == {
        *("model.name", "model.dtype", "data.train", "data.eval", "lora.r", "lora.dropout", "train.output_dir"),
        *("train.device", "train.learning_rate", "train.log_every", "train.epochs", "train.schedule"),
        "train.warmup_fraction",
    }
    assert found["lora.r"].origin == f"{recipe_file}:7"
    assert found["train.batch_size"].value == "2"


def test_auto_says_what_it_became_and_why(recipe_file: Path) -> None:
    found = explained(recipe_file, ["data.eval=auto", "train.output_dir=auto", "train.device=auto", "model.dtype=auto"])
    assert found["data.format"].value == "messages"
    assert found["data.format"].origin_in_words == "default: auto (the format of all 8 rows)"
    assert found["data.eval"].value == "0.05"
    assert "held out" in found["data.eval"].reason
    assert found["data.max_length"].value == "512"
    assert found["data.max_length"].written == "1024"
    assert found["train.output_dir"].value.startswith("__models/")
    for name in ("train.device", "model.dtype", "train.token_budget"):
        assert found[name].written == "auto"
        assert found[name].reason


def test_a_field_is_explained_in_its_own_words_with_alternatives(recipe_file: Path) -> None:
    (item,) = explained(recipe_file, [], ("lora.r",)).values()
    assert item.words.startswith("The LoRA rank: the inner dimension of B·A.")
    assert len(item.alternatives) == 5
    assert "896 trainable parameters" in item.effect
    assert "1,792" in item.effect
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(explanation_page(item))
    page = console.export_text()
    for words in ("lora.r", "The LoRA rank", "recipe.yaml:7", "3,584"):
        assert words in page


def test_the_table_has_every_setting(recipe_file: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(explanation_table(list(explained(recipe_file, []).values())))
    page = console.export_text()
    assert all(name in page for name in all_fields())


def test_a_setting_without_a_computed_effect_shows_what_it_means(recipe_file: Path) -> None:
    item = explained(recipe_file, [])["train.weight_decay"]
    assert item.effect == ""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(explanation_table([item]))
    assert item.words.split(". ")[0].rstrip(".")[:40] in console.export_text()


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("lora.rank", "here it is lora.r"),
        ("lora.alpa", "did you mean lora.alpha"),
        ("learning_rat", "learning_rate"),
        ("qqq", "lists all"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest(word: str, hint: str) -> None:
    with pytest.raises(RecipeError, match="unknown setting") as error:
        full_name(word)
    assert hint in error.value.fix


def test_a_bare_name_is_enough_where_it_is_the_only_one() -> None:
    assert full_name("r") == "lora.r"
    assert full_name("train.seed") == "train.seed"


def test_values_are_shown_as_a_recipe_writes_them() -> None:
    sources = (Source(name="a", config="all", split="test"), Source(name="b", weight=0.5))
    assert shown_value(sources) == "a:all:test, b × 0.5"
    assert [shown_value(value) for value in (None, True, (), 5e-5, 3)] == ["null", "true", "none", "5e-05", "3"]
