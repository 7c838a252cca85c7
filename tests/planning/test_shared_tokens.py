"""What `train.share_prefixes: auto` becomes is decided by the data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from loratune.data.examples import Example
from loratune.data.prepared import PreparedData
from loratune.data.rows.row import Origin
from loratune.planning.shared_tokens import LEAST_FRACTION, shared_fraction, with_shared_prefixes
from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError

MakeRecipe = Callable[..., Recipe]


def data(prompt: int, own: int, rows: int = 16) -> PreparedData:
    """Rows with one prompt of so many tokens, and so many of their own."""
    made = []
    for i in range(rows):
        ids = np.array([*range(prompt), *range(1000 * (i + 1), 1000 * (i + 1) + own)], dtype=np.int32)
        made.append(Example(input_ids=ids, supervised=ids >= 1000, origin=Origin(file="rows.jsonl", line=i)))
    return PreparedData(train=made, eval=[], eval_conversations=[], report={})


def test_the_fraction_is_what_a_step_saves(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(train__batch_size=4)
    assert shared_fraction(data(30, 20).train, recipe) == pytest.approx(1 - (30 + 4 * 20) / (4 * 50))
    assert shared_fraction(data(10, 20).train, recipe) == 0, "ten tokens are no segment"
    assert shared_fraction(data(30, 20).train, tiny_recipe(train__batch_size=1)) == 0


@pytest.mark.parametrize(
    ("prompt", "wanted", "becomes"),
    [(30, "auto", True), (16, "auto", False), (30, False, False), (0, True, True)],
)
def test_auto_shares_where_enough_is_saved(
    prompt: int, wanted: bool | str, becomes: bool, tiny_recipe: MakeRecipe
) -> None:
    recipe = tiny_recipe(train__share_prefixes=wanted)
    changed, counted, choices = with_shared_prefixes(recipe, data(prompt, 300), "cpu")
    assert changed.train.share_prefixes is becomes
    assert choices["train.share_prefixes"].value == str(becomes).lower()
    assert (counted.shared_fraction > LEAST_FRACTION) == (becomes and prompt > 0)
    assert ("shared prefixes" in choices["train.share_prefixes"].reason) == becomes


def test_a_device_that_computes_them_for_each_example_saves_nothing_and_says_so(tiny_recipe: MakeRecipe) -> None:
    """The masks of dropout stay the recipe's."""
    changed, counted, choices = with_shared_prefixes(tiny_recipe(), data(30, 30), "cuda")
    assert changed.train.share_prefixes is True
    assert counted.shared_fraction == 0
    assert "only a cpu computes them once" in choices["train.share_prefixes"].reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"train__engine": "trl"}, "pads examples"), ({"train__neftune_noise_alpha": 5.0}, "length of each example")],
)
def test_what_excludes_sharing_is_said_and_asking_for_it_is_refused(
    settings: dict[str, object], words: str, tiny_recipe: MakeRecipe
) -> None:
    changed, counted, choices = with_shared_prefixes(tiny_recipe(**settings), data(30, 30), "cpu")
    assert (changed.train.share_prefixes, counted.shared_fraction) == (False, 0)
    assert words in choices["train.share_prefixes"].reason
    with pytest.raises(RecipeError, match=words):
        with_shared_prefixes(tiny_recipe(**settings, train__share_prefixes=True), data(30, 30), "cpu")
