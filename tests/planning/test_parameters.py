"""Parameter counts against hand-computed numbers and against PEFT's own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, T5Config
from transformers import models as architectures

from loratune.model.adapter.targets import Matrix, resolve_targets
from loratune.planning.parameters import count_parameters, skeleton
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, int]] = {
    "LlamaConfig": SIZES,
    "Qwen2Config": SIZES,
    "Qwen3Config": SIZES,
    "MistralConfig": SIZES,
    "GemmaConfig": SIZES,
    "Gemma2Config": SIZES,
    "Gemma3TextConfig": SIZES,
    "Phi3Config": SIZES,
    "PhiConfig": SIZES,
    "GPT2Config": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXConfig": SIZES,
    "OPTConfig": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "FalconConfig": SIZES,
    "BertConfig": {**SIZES, "is_decoder": True},
    "MixtralConfig": {**SIZES, "num_local_experts": 4},
    "Qwen2MoeConfig": {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}


def config_of(name: str) -> PretrainedConfig:
    config: PretrainedConfig = getattr(architectures, name)(**CONFIGS[name])
    return config


def test_the_default_model_trains_2_179_072_parameters_with_the_balanced_preset() -> None:
    config = Qwen2Config(
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        tie_word_embeddings=False,
    )
    model = skeleton(config)
    count = count_parameters(model, resolve_targets(model, "balanced"), LoraSection(r=16))
    assert count.trainable == 2_179_072
    assert count.total == 1_777_088_000 + 2_179_072
    assert count.adapter_bytes == 4 * 2_179_072
    assert len(count.per_module) == 56


def test_a_matrix_of_1024_by_1024_at_rank_16_trains_32_768_parameters() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(1024, 1024)})
    assert count_parameters(model, ("layer",), LoraSection(r=16)).trainable == 32_768


@pytest.mark.parametrize("preset", ["minimal", "balanced", "attention", "complete"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT tells that it saw GPT-2's Conv1D.
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers by an old name.
def test_counts_equal_those_of_peft(name: str, preset: str) -> None:
    meta = skeleton(config_of(name))
    names = resolve_targets(meta, preset)
    count = count_parameters(meta, names, LoraSection(r=4))
    model = AutoModelForCausalLM.from_config(config_of(name))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=list(names), task_type="CAUSAL_LM"))
    assert (count.trainable, count.total) == adapted.get_nb_trainable_parameters()
    layers = {
        module_name.removeprefix("base_model.model."): sum(p.numel() for p in module.parameters() if p.requires_grad)
        for module_name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert {item.matrix.name: item.trainable for item in count.per_module} == layers


def test_conv1d_is_counted_with_its_transposed_shape() -> None:
    model = skeleton(config_of("GPT2Config"))
    (first, _) = count_parameters(model, resolve_targets(model, "minimal"), LoraSection(r=2)).per_module
    assert first.matrix == Matrix(name="transformer.h.0.attn.c_attn", d_in=32, d_out=96)
    assert first.trainable == 2 * (32 + 96)


def test_tied_embeddings_count_once() -> None:
    tied, untied = (skeleton(LlamaConfig(**SIZES, tie_word_embeddings=tie)) for tie in (True, False))
    difference = (
        count_parameters(untied, (), LoraSection(r=1)).total - count_parameters(tied, (), LoraSection(r=1)).total
    )
    assert difference == 64 * 32


def test_a_skeleton_holds_no_weights() -> None:
    model = skeleton(config_of("LlamaConfig"))
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


def test_a_configuration_that_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="'t5' cannot be built as a causal language model"):
        skeleton(T5Config())
