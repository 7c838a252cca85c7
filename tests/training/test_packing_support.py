from __future__ import annotations

import torch
from transformers import LlamaConfig

from loratune.recipe.recipe import Recipe
from loratune.training.fsdp import is_sharded
from loratune.training.packing_support import decoder_of, longest_packed, obstacle
from tests.model.adapter.test_attach import tiny


def test_a_plain_decoder_packs_without_limit() -> None:
    model = tiny()
    assert decoder_of(model) is model.model
    assert obstacle(model) == ""
    assert longest_packed(model.config, ()) == (None, "")


def test_a_window_that_only_a_mask_enforces_limits_the_packed_examples() -> None:
    assert longest_packed(tiny().config, {4096, 512}) == (512, "only a mask limits its attention to 512 tokens")


def test_rotary_positions_that_change_with_the_length_limit_them_too() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(max_position_embeddings=1024, rope_parameters=rope)
    length, reason = longest_packed(config, {2048})
    assert length == 1024
    assert "type dynamic" in reason


def test_a_convolution_over_tokens_is_an_obstacle() -> None:
    model = tiny()
    model.model.layers[0].mixer = torch.nn.Conv1d(16, 16, 3)
    assert obstacle(model) == "the state of LlamaDecoderLayer would leak into the next example"


def test_one_process_shares_its_base_with_none() -> None:
    recipe = Recipe.parse({"model": {"name": "m"}, "data": {"train": "d.jsonl"}, "train": {"strategy": "fsdp"}})
    assert not is_sharded(recipe)
