from __future__ import annotations

import pytest

from loratune.planning.auto import NO_LIMIT, choose_max_length
from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError


def recipe(**data: object) -> Recipe:
    return Recipe.parse({"data": {"train": "x.jsonl", **data}})


def test_an_automatic_length_is_the_models_limit() -> None:
    assert choose_max_length(recipe(max_length="auto"), 512).value == "512"
    assert choose_max_length(recipe(max_length="auto"), None).value == str(NO_LIMIT)
    assert choose_max_length(recipe(max_length=100), 512).value == "100"


def test_the_default_length_yields_to_a_short_model_and_one_that_was_asked_for_does_not() -> None:
    assert choose_max_length(recipe(), 512).value == "512"
    with pytest.raises(RecipeError, match=r"data\.max_length is 1024, the model has 512 positions"):
        choose_max_length(recipe(max_length=1024), 512)
