"""A pattern that applies to no module is an error, with the modules it could have meant."""

from __future__ import annotations

import pytest

from loratune.model.adapter.pattern_checks import check_patterns, check_used
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def test_patterns_that_apply_pass() -> None:
    check_patterns(LoraSection(rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 8}), NAMES)


def test_a_pattern_that_matches_nothing_names_the_modules() -> None:
    with pytest.raises(RecipeError, match=r"lora.rank_pattern: k_proj applies to none of the adapted modules") as error:
        check_patterns(LoraSection(rank_pattern={"k_proj": 4}), NAMES)
    assert "adapted are q_proj, up_proj" in error.value.fix
    assert "self_attn.q_proj" in error.value.fix


def test_a_pattern_behind_a_wider_one_is_told_apart_from_one_that_matches_nothing() -> None:
    patterns = {r".*_proj": 1.0, "up_proj": 2.0}
    with pytest.raises(RecipeError, match=r"matches them all") as error:
        check_used("train.learning_rate_pattern", patterns, NAMES, "trained")
    assert error.value.fix == r"write up_proj before .*_proj"
