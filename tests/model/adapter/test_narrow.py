from __future__ import annotations

import pytest
import torch

from loratune.model.adapter.attach import attach_adapter, trainable_parameters, use_fast_layers
from loratune.model.adapter.narrow import cast_once
from loratune.model.adapter.targets import resolve_targets
from loratune.recipe.recipe import LoraSection
from tests.model.adapter.test_attach import tiny


def adapted(dtype: torch.dtype) -> torch.nn.Module:
    base = tiny(2)
    for weight in base.parameters():
        weight.data = weight.data.to(dtype)
    model = attach_adapter(base, LoraSection(dropout=0.0), resolve_targets(base, "complete"), base_name="tiny", seed=0)
    use_fast_layers(model)
    torch.manual_seed(1)
    for weight in trainable_parameters(model).values():
        weight.data.normal_(std=0.1)
    return model


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(20)[None] % 50
    model(input_ids=ids, labels=ids).loss.backward()
    return [weight.grad.clone() for weight in trainable_parameters(model).values() if weight.grad is not None]


def test_copies_of_a_step_give_the_bits_of_casts_in_every_layer() -> None:
    model = adapted(torch.bfloat16)
    expected = gradients(model)
    with cast_once(model):
        fast = [layer for layer in model.modules() if getattr(layer, "is_fast", False)]
        assert [layer.narrow[0].dtype for layer in fast] == [torch.bfloat16] * 14
        found = gradients(model)
        again = gradients(model)
    assert all(layer.narrow is None for layer in fast)
    assert len(found) == 28
    for one, other, third in zip(expected, found, again, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_the_copies_and_not_the_masters_are_computed_with() -> None:
    model = adapted(torch.bfloat16)
    with cast_once(model):
        before = gradients(model)
        for weight in trainable_parameters(model).values():
            weight.data.zero_()  # nothing may do this meanwhile; here it shows which ones count
        assert all(torch.equal(a, b) for a, b in zip(before, gradients(model), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, gradients(model), strict=True))


def test_an_adapter_of_the_weights_own_type_needs_no_copies() -> None:
    model = adapted(torch.float32)
    with cast_once(model):
        assert all(layer.narrow is None for layer in model.modules() if getattr(layer, "is_fast", False))


def test_copies_are_dropped_when_the_step_fails() -> None:
    model = adapted(torch.bfloat16)
    with pytest.raises(RuntimeError, match="as if"), cast_once(model):
        raise RuntimeError("as if memory ran out")
    assert all(layer.narrow is None for layer in model.modules() if getattr(layer, "is_fast", False))
