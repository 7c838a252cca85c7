from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loratune.model.kernels.packed_linear import PackedLinear, unpacked
from loratune.model.patching import replace_class


def test_value_and_gradient_are_those_of_the_unpacked_weight() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    from loratune.model.quantization.torchao import Int4Packed

    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 8), torch.randn(3, 5, 64, requires_grad=True)
    layer.requires_grad_(False)
    layer.weight = torch.nn.Parameter(Int4Packed.of(layer.weight.detach()), requires_grad=False)
    replace_class(layer, PackedLinear)
    expected = F.linear(x, unpacked(layer.weight, torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    upstream = torch.randn(3, 5, 8)
    (gradient,) = torch.autograd.grad(layer(x), x, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8_weight_only", "int4_weight_only", "float8_weight_only"])
def test_value_and_gradient_have_the_bits_of_torchaos_own(kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    from torchao.quantization import quantize_

    from loratune.model.quantization import torchao

    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 96, dtype=dtype).requires_grad_(requires_grad=False)
    quantize_(layer, torchao._config(kind))
    x, upstream = torch.randn(3, 50, 256, dtype=dtype), torch.randn(3, 50, 96, dtype=dtype)

    def value_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        given = x.clone().requires_grad_()
        y = layer(given)
        (gradient,) = torch.autograd.grad(y, given, upstream)
        return y, gradient

    stock = value_and_gradient()
    replace_class(layer, PackedLinear)
    for ours, theirs in zip(value_and_gradient(), stock, strict=True):
        assert torch.equal(ours, theirs)
