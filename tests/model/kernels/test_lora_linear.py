from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loratune.model.kernels.lora_linear import _hash_mask, _mask_in_pieces, keep_mask, lora_linear


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_value_and_every_gradient_equal_the_formula(with_bias: bool, dropped: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(10, 12, dtype=torch.float64), torch.randn(10, dtype=torch.float64) if with_bias else None
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 12), (10, 3)))
    torch.manual_seed(1)
    out = lora_linear(x, weight, bias, a, b, 0.7, dropout=0.4 if dropped else 0.0)
    torch.manual_seed(1)
    z = x * keep_mask(x, 0.4) / 0.6 if dropped else x
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


def test_the_mask_keeps_the_asked_fraction_and_repeats_with_the_seed() -> None:
    x = torch.empty(1001, 333)
    torch.manual_seed(3)
    first, second = keep_mask(x, 0.05), keep_mask(x, 0.05)
    torch.manual_seed(3)
    assert torch.equal(first, keep_mask(x, 0.05))
    # 333,333 draws with p = 0.05: the standard deviation of the fraction is 0.0004
    assert abs(float(first.double().mean()) - 0.95) < 0.002
    # two masks agree as often as independent ones: 0.95² + 0.05²
    assert abs(float((first == second).double().mean()) - 0.905) < 0.003
    columns = first.double().mean(0)
    assert float(columns.min()) > 0.9


@pytest.mark.parametrize("shape", [(1001, 333), (1, 64), (3, 200_000)])
def test_the_mask_of_compiled_code_is_the_same(shape: tuple[int, int]) -> None:
    by_row, by_column = (torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32) for n in shape)
    masks = [make(by_row[:, None], by_column, round(0.3 * 2**32) - 2**31) for make in (_hash_mask, _mask_in_pieces)]
    assert torch.equal(*masks)
    assert masks[0].shape == shape


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_elements_of_the_mask_are_independent(dropout: float) -> None:
    """Rows share the numbers drawn for columns, and columns those for rows, which must not show.

    Each statistic has mean 0 and standard deviation 1 for independent draws.
    """
    torch.manual_seed(0)
    variance = dropout * (1 - dropout)
    m = keep_mask(torch.empty(1000, 1536), dropout).double() - (1 - dropout)
    rectangles = m[1:, 1:] * m[:-1, :-1] * m[1:, :-1] * m[:-1, 1:]
    standardised = {
        "mean": m.mean() / variance**0.5,
        "neighbours in a row": (m[:, 1:] * m[:, :-1]).mean() / variance,
        "neighbours in a column": (m[1:] * m[:-1]).mean() / variance,
        "corners of a rectangle": rectangles.mean() / variance**2,
    }
    for name, value in standardised.items():
        assert abs(float(value)) * m.numel() ** 0.5 < 4, name
    by_row, by_column = m.mean(1).var() / (variance / 1536), m.mean(0).var() / (variance / 1000)
    assert float(by_row) == pytest.approx(1, abs=4 * (2 / 1000) ** 0.5)
    assert float(by_column) == pytest.approx(1, abs=4 * (2 / 1536) ** 0.5)
    correlations = (m.T @ m / 1000 / variance).fill_diagonal_(0)
    assert float(correlations.square().sum() / (1536 * 1535) * 1000) == pytest.approx(1, abs=0.02)
