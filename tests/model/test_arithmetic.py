"""A model computes in float32 as if it had been loaded so, and is afterwards what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loratune.model.arithmetic import float32_arithmetic

IDS = torch.arange(2, 20)[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_it_computes_what_a_float32_copy_computes(tiny_model: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).eval()
    wide = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).float().eval()
    before = model(IDS).logits
    with float32_arithmetic(model):
        inside = model(IDS).logits
        assert model.model.layers[0].self_attn.q_proj.weight.dtype is dtype, "a layer is wide only while it runs"
    assert inside.dtype is torch.float32
    assert torch.equal(inside, wide(IDS).logits)
    assert torch.equal(model(IDS).logits, before)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@torch.no_grad()
def test_a_change_lasts_for_the_block_and_an_error_ends_it(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    before, names = model(IDS).logits, set()

    def halve(name: str, values: torch.Tensor) -> torch.Tensor:
        names.add(name)
        return values / 2 if name == "model.layers.1.mlp.up_proj.weight" else values

    with float32_arithmetic(model, halve):
        assert not torch.equal(model(IDS).logits, before)
    assert {name for name, _ in model.named_parameters()} <= names
    with pytest.raises(IndexError), float32_arithmetic(model, halve):
        model(torch.tensor([[10**6]]))
    assert torch.equal(model(IDS).logits, before)
