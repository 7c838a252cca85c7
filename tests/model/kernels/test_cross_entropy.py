from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from loratune.model.device import cpp_compiler
from loratune.model.kernels import cross_entropy
from loratune.model.kernels.cross_entropy import (
    Head,
    cross_entropy_each,
    cross_entropy_per_token,
    head_logits,
    sum_cross_entropy,
)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float,
    softcap: float | None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 3.0)])
def test_sum_and_gradient_equal_torch(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, scale: float, softcap: float | None
) -> None:
    monkeypatch.setitem(
        cross_entropy.CHUNK_BYTES, "cpu", 4 * 101 * 16
    )  # chunks of 16 rows: several, the last one partial
    torch.manual_seed(0)
    hidden = torch.randn(70, 24, requires_grad=True)
    weight, bias = torch.randn(101, 24), torch.randn(101) if with_bias else None
    targets = torch.randint(0, 101, (70,))
    loss = sum_cross_entropy(hidden, Head(weight, bias, logit_scale=scale, softcap=softcap), targets)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    per_token = reference(hidden, weight, bias, targets, scale, softcap)
    (expected,) = torch.autograd.grad(3 * per_token.sum(), hidden)
    # float32: sums of 24 products and a softmax over 101; both sides round differently by a few units in 2^-24
    torch.testing.assert_close(loss, per_token.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-5)
    actual = cross_entropy_per_token(hidden, Head(weight, bias, logit_scale=scale, softcap=softcap), targets)
    torch.testing.assert_close(actual, per_token.detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("scale", "softcap", "with_bias"), [(1.0, None, False), (0.25, None, True), (2.0, 3.0, True)])
def test_a_trained_head_gets_torch_s_gradient(
    monkeypatch: pytest.MonkeyPatch, scale: float, softcap: float | None, with_bias: bool
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * 101 * 16)
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 24, requires_grad=True), torch.randn(101, 24, requires_grad=True)
    bias = torch.randn(101, requires_grad=True) if with_bias else None
    inputs = [hidden, weight, *([bias] if bias is not None else [])]
    targets = torch.randint(0, 101, (70,))
    loss = sum_cross_entropy(hidden, Head(weight, bias, logit_scale=scale, softcap=softcap), targets)
    actual = torch.autograd.grad(3 * loss, inputs)
    expected = torch.autograd.grad(3 * reference(hidden, weight, bias, targets, scale, softcap).sum(), inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (2.0, 3.0)])
def test_trained_rows_of_a_frozen_head_get_torch_s_gradient(
    monkeypatch: pytest.MonkeyPatch, scale: float, softcap: float | None
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * 101 * 16)
    torch.manual_seed(0)
    hidden, rows = torch.randn(70, 24, requires_grad=True), torch.randn(3, 24, requires_grad=True)
    weight, numbers = torch.randn(101, 24), torch.tensor([5, 99, 100])
    targets = torch.randint(0, 101, (70,))
    targets[:9] = numbers.repeat(3)
    loss = sum_cross_entropy(hidden, Head(weight, None, rows, numbers, scale, softcap), targets)
    actual = torch.autograd.grad(3 * loss, [hidden, rows])
    whole = weight.index_copy(0, numbers, rows)
    per_token = reference(hidden, whole, None, targets, scale, softcap)
    expected = torch.autograd.grad(3 * per_token.sum(), [hidden, rows])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-5)
    alone = cross_entropy_per_token(hidden, Head(weight, None, rows, numbers, scale, softcap), targets)
    torch.testing.assert_close(alone, per_token.detach(), rtol=1e-5, atol=1e-4)


def test_a_float32_head_is_computed_with_in_the_type_of_the_hidden_states() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    weight, targets = (torch.randn(200, 64) / 8).requires_grad_(), torch.randint(0, 200, (40,))
    loss = sum_cross_entropy(hidden, Head(weight), targets)
    narrow = weight.detach().bfloat16()
    torch.testing.assert_close(loss, sum_cross_entropy(hidden, Head(narrow), targets), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.dtype == torch.float32
    exact = narrow.double().requires_grad_()
    (expected,) = torch.autograd.grad(
        F.cross_entropy(hidden.detach().double() @ exact.T, targets, reduction="sum"), exact
    )
    assert (gradient.double() - expected).norm() / expected.norm() < 2**-6


def test_bfloat16_stays_within_its_rounding() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    weight, targets = torch.randn(200, 64, dtype=torch.bfloat16) / 8, torch.randint(0, 200, (40,))
    loss = sum_cross_entropy(hidden, Head(weight), targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    # 8 bits of mantissa: logits of 1 are known to 2^-8, and so is each token's loss
    torch.testing.assert_close(loss.double(), expected, rtol=2**-8, atol=0)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < 2**-6


@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler"))],
)
@pytest.mark.parametrize(
    ("smoothing", "scale", "softcap", "with_bias"), [(0.1, 1.0, None, False), (0.4, 0.25, 3.0, True)]
)
def test_smoothed_sum_and_gradient_equal_torch(
    monkeypatch: pytest.MonkeyPatch,
    smoothing: float,
    scale: float,
    softcap: float | None,
    with_bias: bool,
    compiled: bool,
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * 101 * 16)  # as above
    torch.manual_seed(0)
    hidden = torch.randn(70, 24, requires_grad=True)
    weight, bias = torch.randn(101, 24), torch.randn(101) if with_bias else None
    targets = torch.randint(0, 101, (70,))
    head = Head(weight, bias, logit_scale=scale, softcap=softcap)
    loss = sum_cross_entropy(hidden, head, targets, smoothing=smoothing, compiled=compiled)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    expected = reference(hidden, weight, bias, targets, scale, softcap, smoothing).sum()
    (expected_gradient,) = torch.autograd.grad(3 * expected, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=2e-5)
    unsmoothed = sum_cross_entropy(hidden, head, targets)
    assert loss.item() != pytest.approx(unsmoothed.item(), rel=1e-3)


def test_bfloat16_keeps_the_even_part_of_a_smoothed_target() -> None:
    """ε/V is below the resolution of bfloat16 at a p near 1, but is all of the gradient where the model is sure."""
    torch.manual_seed(0)
    weight = torch.randn(300, 32, dtype=torch.bfloat16)
    targets = torch.randint(0, 300, (20,))
    hidden = (weight[targets] * 2).clone().requires_grad_()
    loss = sum_cross_entropy(hidden, Head(weight), targets, smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T, targets, reduction="sum", label_smoothing=0.1)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=2**-8, atol=0)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < 2**-6


def test_no_supervised_position_is_a_loss_of_zero_with_a_gradient() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    loss = sum_cross_entropy(hidden, Head(torch.randn(5, 8)), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_summed_is_given_position_by_position_and_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, smoothing: float
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * 101 * 16)
    torch.manual_seed(0)
    hidden, weight, targets = (
        torch.randn(70, 24, requires_grad=True),
        torch.randn(101, 24),
        torch.randint(0, 101, (70,)),
    )
    each = torch.full((70,), float("nan"))
    loss = sum_cross_entropy(hidden, Head(weight), targets, smoothing=smoothing, each_S=each)
    (gradient,) = torch.autograd.grad(loss, hidden)
    plain = sum_cross_entropy(hidden, Head(weight), targets, smoothing=smoothing)
    (expected,) = torch.autograd.grad(plain, hidden)
    assert torch.equal(loss, plain)
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(
        each, reference(hidden, weight, None, targets, 1.0, None, smoothing).detach(), rtol=1e-5, atol=1e-4
    )


def test_a_gpu_gets_full_tiles_of_rows() -> None:
    assert cross_entropy.chunk_rows(151_936, "cuda") == 1408  # 1,766 fit
    assert cross_entropy.chunk_rows(32_000, "cuda") == 1408
    assert cross_entropy.chunk_rows(256_000, "cuda") == 1024  # 1,048 fit
    assert cross_entropy.chunk_rows(3_000_000, "cuda") == 89  # less than a tile fits
    assert cross_entropy.chunk_rows(49_152, "cpu") == 170
    assert cross_entropy.chunk_rows(49_152, "mps") == 682
    assert cross_entropy.chunk_rows(10**9, "cpu") == 16


@pytest.mark.parametrize("loss", [sum_cross_entropy, cross_entropy_each, cross_entropy_per_token])
def test_no_more_logits_are_held_at_once_than_a_chunk_has(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[..., torch.Tensor]
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * 101 * 16)
    held = []

    def recorded(hidden: torch.Tensor, head: Head) -> torch.Tensor:
        logits = head_logits(hidden, head)
        held.append(logits.numel())
        return logits

    monkeypatch.setattr(cross_entropy, "head_logits", recorded)
    loss(torch.randn(70, 24), Head(torch.randn(101, 24)), torch.randint(0, 101, (70,)))
    assert held == [16 * 101] * 4 + [6 * 101]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_single_losses_have_torch_s_values_and_weighted_gradients(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * 101 * 16)
    torch.manual_seed(0)
    hidden = torch.randn(70, 24, requires_grad=True)
    weight, bias, targets = torch.randn(101, 24), torch.randn(101), torch.randint(0, 101, (70,))
    factors = torch.randn(70)  # what a preference asks for differs in size and sign from token to token
    losses = cross_entropy_each(hidden, Head(weight, bias, logit_scale=0.5, softcap=softcap), targets)
    (gradient,) = torch.autograd.grad((factors * losses).sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    logits = F.linear(exact, weight.double(), bias.double()) * 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none")
    (slope,) = torch.autograd.grad((factors.double() * expected).sum(), exact)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=2e-5)


def test_single_losses_need_a_frozen_head() -> None:
    weight = torch.randn(10, 4, requires_grad=True)
    with pytest.raises(AssertionError, match="head is trained"):
        cross_entropy_each(torch.randn(2, 4), Head(weight), torch.tensor([1, 2]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_position_may_count_several_times(smoothing: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 8, requires_grad=True)
    head, targets = Head(torch.randn(11, 8)), torch.tensor([3, 1, 4, 1, 5])
    counts = torch.tensor([1.0, 3.0, 2.0, 1.0, 7.0])
    each = torch.empty(5)
    total = sum_cross_entropy(hidden, head, targets, smoothing=smoothing, each_S=each, counts_S=counts)
    repeats = counts.long()
    repeated, repeated_each = hidden.repeat_interleave(repeats, 0), torch.empty(14)
    expected = sum_cross_entropy(
        repeated, head, targets.repeat_interleave(repeats), smoothing=smoothing, each_S=repeated_each
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(each.repeat_interleave(repeats), repeated_each)
    (gradient,), (wanted,) = (torch.autograd.grad(one, hidden) for one in (total, expected))
    torch.testing.assert_close(gradient, wanted)


def test_code_with_sizes_in_it_gives_the_same_for_any_number_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's has them: one graph, whatever the positions."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(cross_entropy, "_compiled_chunk", cache(cross_entropy._compiled_chunk.__wrapped__))
    monkeypatch.setattr(cross_entropy, "SIZES_IN_CODE", {"cpu"})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    head = Head(torch.randn(101, 24))
    for positions in (70, 9, 33):
        hidden, targets = torch.randn(positions, 24), torch.randint(0, 101, (positions,))
        results = []
        for compiled in (True, False):
            leaf = hidden.clone().requires_grad_()
            loss = sum_cross_entropy(leaf, head, targets, compiled=compiled)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
