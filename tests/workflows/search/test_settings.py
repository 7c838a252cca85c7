"""Which trials a command line means."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError
from loratune.workflows.search.settings import (
    draw_trials,
    parse_settings,
    short_name,
    split_values,
    with_settings,
)


def drawn(*words: str, trials: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    return draw_trials(parse_settings(words)[1], trials, seed)


def test_lists_give_every_combination_in_order_and_single_values_are_shared() -> None:
    fixed, swept = parse_settings(
        ["train.epochs=1", "train.learning_rate=1e-4,2e-4", "lora.targets=minimal,[q_proj,k_proj]"]
    )
    assert fixed == ["train.epochs=1"]
    trials = draw_trials(swept, None, 0)
    assert [short_name(trial) for trial in trials] == [
        "learning_rate=1e-4, targets=minimal",
        "learning_rate=1e-4, targets=[q_proj,k_proj]",
        "learning_rate=2e-4, targets=minimal",
        "learning_rate=2e-4, targets=[q_proj,k_proj]",
    ]
    recipe = with_settings(Recipe(), [f"{name}={text}" for name, text in trials[1].items()])
    assert recipe.lora.targets == ("q_proj", "k_proj")
    assert recipe.train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]),
        ("[a,b],c", ["[a,b]", "c"]),
        ("{x: 1, y: 2}", ["{x: 1, y: 2}"]),
        ("'a,b', c", ["'a,b'", "c"]),
    ],
)
def test_commas_in_brackets_and_quotes_belong_to_a_value(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_a_range_is_covered_evenly_in_the_logarithm() -> None:
    values = [float(trial["train.learning_rate"]) for trial in drawn("train.learning_rate=1e-5..1e-2", trials=12)]
    thirds = Counter(int((math.log10(value) + 5) // 1) for value in values)
    assert thirds == {0: 4, 1: 4, 2: 4}
    assert values != sorted(values)


def test_a_range_of_whole_numbers_gives_whole_numbers_once_and_lists_are_balanced() -> None:
    ranks = [trial["lora.r"] for trial in drawn("lora.r=4..8", trials=30)]
    assert sorted(ranks) == ["4", "5", "6", "7", "8"]
    trials = drawn("lora.r=2..64", "lora.alpha=8,16,32", trials=9)
    assert Counter(trial["lora.alpha"] for trial in trials) == {"8": 3, "16": 3, "32": 3}


def test_the_same_seed_draws_the_same_and_fewer_trials_are_some_of_the_grid() -> None:
    words = ("lora.r=1,2,3,4", "lora.alpha=1,2,3,4")
    some = drawn(*words, trials=5)
    assert some == drawn(*words, trials=5)
    assert some != drawn(*words, trials=5, seed=1)
    assert len(some) == 5
    assert all(trial in drawn(*words) for trial in some)
    assert len(drawn(*words, trials=99)) == 16


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["lora.r=8"], "nothing to compare"),
        (["lora.r"], "is not a setting"),
        (["lora.r=8,8"], "given twice"),
        (["lora.r=8,"], "empty"),
        (["lora.r=8,16", "lora.r=2,4"], "lora.r is given twice"),
        (["train.weight_decay=0..0.1"], "logarithmic"),
        (["lora.r=8..4"], "0 < low < high"),
        (["data.max_length=512,1024"], "data.max_length cannot vary"),
        (["model.name=a,b"], "model.name cannot vary"),
        (["train.output_dir=a,b"], "each trial has its own"),
        (["train.learning_rate=1e-5..1e-3", "lora.r=1,2"], ""),
    ],
)
def test_what_is_no_sweep_is_refused(words: list[str], problem: str) -> None:
    if not problem:
        assert len(drawn(*words)) == 16
        return
    with pytest.raises(RecipeError, match=problem):
        parse_settings(words)


def test_too_many_trials_are_refused() -> None:
    values = ",".join(map(str, range(1, 40)))
    with pytest.raises(RecipeError, match="1,521 trials are more than 500"):
        drawn(f"lora.r={values}", f"lora.alpha={values}")
