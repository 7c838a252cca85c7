from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loratune.model.kernels.dropout import AdapterDropout, row_numbers, rows_of_forward
from loratune.model.kernels.lora_linear import lora_linear


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_value_and_every_gradient_equal_the_formula(with_bias: bool, dropped: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(10, 12, dtype=torch.float64), torch.randn(10, dtype=torch.float64) if with_bias else None
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 12), (10, 3)))
    drop = AdapterDropout(0.4, "q_proj", 12, x.device) if dropped else None
    with rows_of_forward(row_numbers(1, 0, [3, 8], [7, 7])):
        out = lora_linear(x, weight, bias, a, b, 0.7, drop)
        z = x if drop is None else drop(x)
    expected = F.linear(x, weight, bias) + 0.7 * (z @ a.T) @ b.T
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    actual_gradients = torch.autograd.grad(out, (x, a, b), upstream, retain_graph=True)
    for actual, wanted in zip(actual_gradients, torch.autograd.grad(expected, (x, a, b), upstream), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_the_first_layer_has_no_gradient_to_its_input() -> None:
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    a, b = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    lora_linear(x, weight, None, a, b, 2.0).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(b.grad, 2.0 * torch.ones(4, 5).T @ (x @ a.detach().T))


def test_bfloat16_compute_keeps_float32_masters_and_their_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(48, 32, dtype=torch.bfloat16)
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    out = lora_linear(x, weight, None, a, b, 0.5)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    exact_x = x.detach().double().requires_grad_()
    exact_a, exact_b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    exact = exact_x @ weight.double().T + 0.5 * (exact_x @ exact_a.T) @ exact_b.T
    exact.square().sum().backward()
    for actual, wanted in ((x.grad, exact_x.grad), (a.grad, exact_a.grad), (b.grad, exact_b.grad)):
        assert actual is not None
        assert wanted is not None
        # products of numbers with 8 bits, summed in float32: relative error of the whole within some 2^-8
        assert (actual.double() - wanted).norm() < 2**-6 * wanted.norm()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
