from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loratune.model.adapter.attach import (
    attach_adapter,
    fallback_note,
    short_module_names,
    trainable_parameters,
    use_fast_layers,
    use_repeatable_dropout,
)
from loratune.model.adapter.targets import resolve_targets
from loratune.model.kernels.dropout import row_numbers, rows_of_forward
from loratune.recipe.recipe import LoraSection


def tiny(num_layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            attention_bias=True,
            initializer_range=0.3,
            pad_token_id=0,
        )
    )


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone() -> None:
    base, ids = tiny(), torch.arange(3, 20)[None]
    expected = base(ids).logits
    targets = resolve_targets(base, "complete")
    model = attach_adapter(base, LoraSection(dropout=0.0), targets, base_name="tiny", seed=3)
    torch.testing.assert_close(model(ids).logits, expected)
    torch.manual_seed(99)
    again = attach_adapter(tiny(), LoraSection(dropout=0.0), targets, base_name="tiny", seed=3)
    other = attach_adapter(tiny(), LoraSection(dropout=0.0), targets, base_name="tiny", seed=4)
    one, same, different = (list(trainable_parameters(m).values()) for m in (model, again, other))
    assert all(torch.equal(p, q) for p, q in zip(one, same, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(one, different, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapter_on", [True, False])
def test_fast_layers_equal_pefts_own_value_and_gradient(dropout: float, adapter_on: bool) -> None:
    """Also the alarm for a PEFT that moves: if its layers compute something else, this fails."""
    base = tiny().double()
    model = attach_adapter(
        base, LoraSection(dropout=dropout), resolve_targets(base, "complete"), base_name="tiny", seed=0
    ).double()
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.arange(3, 20)[None]

    def run() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        model.zero_grad()
        with rows_of_forward(row_numbers(5, 0, [2], [17])):
            logits = model(ids).logits
        if adapter_on:
            logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in trainable_parameters(model).values() if p.grad is not None]

    if not adapter_on:
        with model.disable_adapter():
            expected, _ = run()
            assert use_fast_layers(model) == 14
            actual, _ = run()
        assert torch.equal(actual, expected)
        return
    use_repeatable_dropout(model)
    expected, gradients = run()
    assert use_fast_layers(model) == 14
    actual, fast_gradients = run()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert len(fast_gradients) == 28
    for fast, own in zip(fast_gradients, gradients, strict=True):
        torch.testing.assert_close(fast, own, rtol=1e-9, atol=1e-12)


def test_saved_target_names_are_short_where_that_chooses_the_same() -> None:
    model = tiny()
    assert short_module_names(model, resolve_targets(model, "balanced")) == ("q_proj", "v_proj")
    assert short_module_names(model, ("model.layers.1.self_attn.q_proj",)) == ("model.layers.1.self_attn.q_proj",)


def test_conv1d_layers_keep_pefts_own_forward() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    model = attach_adapter(base, LoraSection(), resolve_targets(base, "attention"), base_name="tiny", seed=0)
    assert model.peft_config["default"].fan_in_fan_out
    assert use_fast_layers(model) == 0


def test_matrices_that_the_fast_layers_cannot_compute_are_told() -> None:
    llama = tiny()
    model = attach_adapter(llama, LoraSection(), resolve_targets(llama, "complete"), base_name="tiny", seed=0)
    use_fast_layers(model)
    assert fallback_note(model) == ""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model = attach_adapter(gpt2, LoraSection(), resolve_targets(gpt2, "balanced"), base_name="tiny", seed=0)
    use_fast_layers(model)
    assert fallback_note(model).startswith("2 of 2 adapted matrices (Conv1D) run PEFT's own forward")
