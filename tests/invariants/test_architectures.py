"""Packed examples equal separate ones, value and gradient, on every attention that people fine-tune; or it is said."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.configuration_utils import PreTrainedConfig

from loratune.data.batch import collate
from loratune.data.conversation import Origin
from loratune.data.render import Example
from loratune.errors import RunError
from loratune.model.adapter import attach_adapter, trainable_parameters
from loratune.model.targets import resolve_targets
from loratune.recipe import LoraSection
from loratune.training.loss import make_loss

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**COMMON, "head_dim": 8, "sliding_window": 6}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "mistral-window": MistralConfig(**COMMON, sliding_window=6),
    "gemma2": Gemma2Config(**GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=8),
    "phi3": Phi3Config(**COMMON),
    "cohere": CohereConfig(**COMMON, logit_scale=0.3),
    "granite": GraniteConfig(**COMMON, logits_scaling=4.0),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    ),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "opt": OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
        pad_token_id=0,
    ),
}


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for length in (17, 5, 23, 9, 31):
        supervised = rng.random(length) < 0.6
        supervised[-1] = True
        ids = rng.integers(3, 97, length).astype(np.int32)
        made.append(Example(input_ids=ids, supervised=supervised, origin=Origin(file="made", line=length)))
    return made


def plain_loss_and_gradients(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """The model's own forward with labels, one example at a time: the reference."""
    total = torch.zeros(())
    for example in examples():
        ids = torch.from_numpy(example.input_ids).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        labels = ids[0].where(torch.from_numpy(example.supervised), torch.tensor(-100))
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
    gradients = torch.autograd.grad(total, list(trainable_parameters(model).values()))
    return float(total), dict(zip(trainable_parameters(model), gradients, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, on made-up token ids and configs
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_and_every_gradient_equal_the_models_own(name: str) -> None:
    torch.manual_seed(0)
    config: PreTrainedConfig = copy.deepcopy(CONFIGS[name])  # a model keeps its attention in its config
    base = AutoModelForCausalLM.from_config(config)
    lora = LoraSection(r=3, dropout=0.0)
    model = attach_adapter(base, lora, resolve_targets(base, "complete"), base_name="tiny", seed=0)
    for parameter_name, parameter in trainable_parameters(model).items():
        if "lora_B" in parameter_name:  # zero at the start, which would hide A's gradient
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    expected, expected_gradients = plain_loss_and_gradients(model)
    loss, reason = make_loss(model, examples())
    assert loss.packed, reason
    total = loss.sum(collate(examples()))
    gradients = torch.autograd.grad(total, list(trainable_parameters(model).values()))
    assert float(total) == pytest.approx(expected, rel=1e-5)
    # float32 through two layers: relative to the largest gradient of each matrix
    for gradient, (parameter_name, wanted) in zip(gradients, expected_gradients.items(), strict=True):
        scale = float(wanted.abs().max())
        assert scale > 0, parameter_name
        assert float((gradient - wanted).abs().max()) < 1e-4 * scale, parameter_name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_whose_state_would_leak_is_trained_one_example_at_a_time_and_says_so() -> None:
    from transformers import MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2)
    base = AutoModelForCausalLM.from_config(config)
    model = attach_adapter(
        base, LoraSection(r=3, dropout=0.0), ("backbone.layers.0.mixer.x_proj",), base_name="x", seed=0
    )
    loss, reason = make_loss(model, examples())
    assert not loss.packed
    assert reason


def test_a_model_whose_losses_are_not_numbers_is_refused() -> None:
    base = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))
    torch.nn.init.constant_(base.model.norm.weight, float("nan"))
    model = attach_adapter(base, LoraSection(r=3), resolve_targets(base, "balanced"), base_name="tiny", seed=0)
    with pytest.raises(RunError, match="differs from LlamaForCausalLM's own by nan"):
        make_loss(model, examples())
