from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from loratune.model.kernels import block_attention as module
from loratune.model.kernels.block_attention import block_attention

BOUNDARIES = torch.tensor([0, 7, 8, 21], dtype=torch.int32)


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Full scores, with a mask for the examples, the future and the window."""
    tokens, shared = query.shape[2], query.shape[1] // key.shape[1]
    number = torch.zeros(tokens, dtype=torch.long)
    for i, (start, stop) in enumerate(pairwise(BOUNDARIES.tolist())):
        number[start:stop] = i
    place = torch.arange(tokens)
    distance = place[:, None] - place[None]
    visible = (number[:, None] == number[None]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = (query @ key.mT * scale).masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block", [4, 192])
def test_value_and_gradients_are_those_of_full_attention(
    monkeypatch: pytest.MonkeyPatch, window: int | None, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_QUERIES", block)
    torch.manual_seed(0)
    shapes = ((1, 4, 21, 8), (1, 2, 21, 8), (1, 2, 21, 6))
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(1, 21, 4, 6, dtype=torch.float64)
    actual = block_attention(*inputs, BOUNDARIES, scale=0.3, window=window)
    expected = reference(*inputs, 0.3, window)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    gradients, expected_gradients = (torch.autograd.grad(out, inputs, upstream) for out in (actual, expected))
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
