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
