from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from loratune.planning.presets import count_presets
from loratune.recipe.recipe import LoraSection


def test_the_four_presets_are_counted_exactly() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    counted = {
        preset.name: preset.parameters and preset.parameters.trainable
        for preset in count_presets(model, LoraSection(r=4))
    }

    query, value, feed_forward = 4 * (32 + 32), 4 * (32 + 16), 3 * 4 * (32 + 64)
    assert counted == {
        "minimal": 2 * query,
        "balanced": 2 * (query + value),
        "attention": 2 * 2 * (query + value),
        "complete": 2 * (2 * (query + value) + feed_forward),
    }


def test_a_preset_that_a_model_has_nothing_for_says_so() -> None:
    from torch import nn

    class OnlyFeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in "ab")

    presets = {preset.name: preset for preset in count_presets(OnlyFeedForward(), LoraSection(r=2))}

    assert presets["minimal"].parameters is None
    assert "has no query matrix" in presets["minimal"].targets_in_words
    assert presets["complete"].parameters is not None
    assert presets["complete"].parameters.trainable == 2 * 2 * (2 * 12)


def test_fused_matrices_make_presets_equal() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))

    presets = {preset.name: preset for preset in count_presets(model, LoraSection(r=2))}

    assert presets["minimal"].targets == presets["balanced"].targets == ("transformer.h.0.attn.c_attn",)
