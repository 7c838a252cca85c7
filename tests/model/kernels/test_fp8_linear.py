"""On a CPU too, torch has the scaled product (with scales of rows from 2.12 on): only speed is a matter of the GPU."""

from __future__ import annotations

import pytest
import torch

from loratune.model.kernels.fp8_linear import LARGEST, Fp8Linear, quantize_rows


def layer(inputs: int, outputs: int, *, bias: bool) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias).to(torch.bfloat16).requires_grad_(requires_grad=False)


def scales_rows() -> bool:
    """Whether torch's product on this CPU takes a scale for each row, as on a GPU; that of torch 2.11 takes one."""
    try:
        Fp8Linear(layer(16, 16, bias=False))(torch.ones(16, 16, dtype=torch.bfloat16))
    except RuntimeError as error:
        if "per-tensor" not in str(error):
            raise
        return False
    return True


needs_rows = pytest.mark.skipif(not scales_rows(), reason="this torch has no scales of rows on a CPU")


def test_a_row_is_known_to_a_sixteenth_whatever_its_size() -> None:
    x = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    quantized, scale = quantize_rows(x)
    # e4m3 has three bits of fraction: half a unit of the last is 1/16 of the number, or of the row's smallest step
    error = (quantized.float() * scale - x).abs()
    assert (error <= x.abs() / 16 + scale * 2**-10).all()
    assert (quantized.float().abs().amax(-1) == LARGEST).all()


def test_a_row_of_zeros_stays_zero() -> None:
    quantized, scale = quantize_rows(torch.zeros(2, 16))
    assert torch.equal(quantized.float() * scale, torch.zeros(2, 16))


@needs_rows
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_the_quantized_factors(*, bias: bool) -> None:
    """Against products of the dequantized factors in float64; what remains is bfloat16's rounding of the result."""
    plain = layer(48, 32, bias=bias)
    fast = Fp8Linear(plain)
    x = torch.randn(3, 7, 48).to(torch.bfloat16).requires_grad_()
    upstream = torch.randn(3, 7, 32).to(torch.bfloat16)
    y = fast(x)
    y.backward(upstream)

    def dequantized(rows: torch.Tensor) -> torch.Tensor:
        quantized, scale = quantize_rows(rows)
        return quantized.double() * scale.double()

    expected = dequantized(x.detach().view(-1, 48)) @ dequantized(plain.weight).T
    if bias:
        expected = expected + plain.bias.double()
    expected_grad = dequantized(upstream.view(-1, 32)) @ dequantized(plain.weight.T).T
    torch.testing.assert_close(y.double().view(-1, 32), expected, rtol=2**-7, atol=2**-7)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double().view(-1, 48), expected_grad, rtol=2**-7, atol=2**-7)


@needs_rows
def test_a_tokens_result_does_not_depend_on_the_others() -> None:
    fast = Fp8Linear(layer(32, 32, bias=False))
    x = torch.randn(9, 32).to(torch.bfloat16)
    x[4] *= 1000
    together = fast(x)
    for i in range(9):
        assert torch.equal(together[i], fast(x[i : i + 1])[0])


@needs_rows
def test_it_is_near_the_plain_layer() -> None:
    """Two factors of three fractional bits each: 3 to 4 % of the result's norm, for weights and inputs as here."""
    plain = layer(256, 128, bias=True)
    fast = Fp8Linear(plain)
    x = torch.randn(64, 256).to(torch.bfloat16)
    difference = (fast(x) - plain(x)).float().norm() / plain(x).float().norm()
    assert 0.001 < difference < 0.05
