from __future__ import annotations

import math

import pytest
from peft import LoraConfig

from loratune.model.adapter.attach import attach_adapter, trainable_parameters
from loratune.model.adapter.targets import Matrix, matrix, resolve_targets
from loratune.model.adapter.variants import (
    as_int_if_whole,
    check_ranks,
    num_trainable,
    plain_config,
    rank_notes,
    saved_rank,
    scale_of,
)
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError
from tests.model.adapter.test_attach import tiny

SQUARE = Matrix(name="model.layers.0.self_attn.q_proj", d_in=16, d_out=16)


def test_the_scale_is_alpha_over_r_or_over_its_root() -> None:
    assert scale_of(LoraSection(r=8, alpha=32)) == 4
    assert scale_of(LoraSection(r=9, alpha=6, variant="rslora")) == pytest.approx(6 / math.sqrt(9))
    patterned = LoraSection(r=8, alpha=32, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 2})
    assert scale_of(patterned, SQUARE.name) == 0.5


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
def test_the_counted_parameters_are_those_of_the_adapter(variant: str) -> None:
    base, lora = tiny(), LoraSection(r=3, variant=variant)  # type: ignore[arg-type]
    targets = resolve_targets(base, "complete")
    counted = sum(num_trainable(lora, matrix(name, base.get_submodule(name))) for name in targets)
    model = attach_adapter(base, lora, targets, base_name="tiny", seed=0)
    assert counted == sum(parameter.numel() for parameter in trainable_parameters(model).values())


def test_an_adapter_of_a_changed_base_is_saved_with_twice_the_rank_and_the_same_scale() -> None:
    assert saved_rank(LoraSection(r=8, variant="pissa")) == 16
    assert saved_rank(LoraSection(r=8)) == 8
    plain = plain_config(LoraConfig(r=8, lora_alpha=4, rank_pattern={"q": 2}, init_lora_weights="pissa_niter_16"))
    assert (plain.r, plain.lora_alpha, plain.rank_pattern, plain.init_lora_weights) == (16, 8, {"q": 4}, True)


def test_ranks_above_the_shorter_side_are_noted_and_absurd_ones_refused() -> None:
    assert rank_notes(LoraSection(r=16), [SQUARE]) == ()
    (note,) = rank_notes(LoraSection(r=17), [SQUARE])
    assert "exceeds the shorter side of 1 adapted matrices" in note
    check_ranks(LoraSection(r=160), [SQUARE])
    with pytest.raises(RecipeError, match=r"lora\.r is 161, far more than both sides"):
        check_ranks(LoraSection(r=161), [SQUARE])


def test_whole_alphas_are_written_as_integers() -> None:
    assert repr(as_int_if_whole(32.0)) == "32"
    assert repr(as_int_if_whole(0.5)) == "0.5"
