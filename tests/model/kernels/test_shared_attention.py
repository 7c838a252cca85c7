"""Attention over segments is that of every sequence on its own."""

from __future__ import annotations

import pytest
import torch

from loratune.model.kernels import block_attention as module
from loratune.model.kernels.attention import packed_attention

# 0 ─┬─ 1 ─┬─ 2
#    │     └─ 3
#    └─ 4            5 stands alone
LENGTHS = (9, 5, 4, 7, 1, 6)
PARENTS = (-1, 0, 1, 1, 0, -1)
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0)
TREE = torch.stack([ENDS, torch.tensor([*PARENTS, -1])]).int()


def visible(window: int | None) -> torch.Tensor:
    """Who sees whom, by the definition: a token sees those before it on its own path."""
    tokens = int(ENDS[-1])
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for segment in range(len(LENGTHS)):
        path: list[int] = []
        step = segment
        while step >= 0:
            path = [*range(int(ENDS[step]), int(ENDS[step + 1])), *path]
            step = PARENTS[step]
        for place in range(len(path) - LENGTHS[segment], len(path)):
            first = 0 if window is None else max(0, place - window + 1)
            seen[path[place], path[first : place + 1]] = True
    return seen


@pytest.mark.parametrize("block", [3, 192])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 2.0), (12, 2.0)])
def test_value_and_gradients_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, block: int, has_sinks: bool, window: int | None, softcap: float | None
) -> None:
    monkeypatch.setattr(module, "BLOCK_QUERIES", block)
    torch.manual_seed(0)
    tokens = int(ENDS[-1])
    inputs = [
        torch.randn(1, heads, tokens, width, dtype=torch.float64, requires_grad=True)
        for heads, width in ((4, 8), (2, 8), (2, 6))
    ]
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None
    out, _ = packed_attention(
        torch.nn.Module(),
        *inputs,
        None,
        scaling=0.3,
        cu_seq_lens_q=ENDS.int(),
        cu_seq_lens_k=TREE,
        max_length_q=21,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
    )
    query, key, value = inputs
    scores = query @ key.repeat_interleave(2, 1).mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible(window), float("-inf")).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[:, None, None].exp())
    expected = (weights / total @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_bfloat16_gradients_of_shared_keys_are_summed_in_float32() -> None:
    """A thousand sequences that each add little to the same key: sums in bfloat16 would stop growing."""
    children = 1000
    ends = torch.tensor([0, *range(2, 2 + children + 1)])
    tree = torch.stack([ends, torch.tensor([-1, *[0] * children, -1])]).int()
    query, key, value = (torch.randn(1, 1, int(ends[-1]), 8).bfloat16().requires_grad_() for _ in range(3))
    whole = {"cu_seq_lens_q": ends.int(), "cu_seq_lens_k": tree, "max_length_q": 3}
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, **whole)
    (grad,) = torch.autograd.grad(out.sum(), value)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    exact, _ = packed_attention(torch.nn.Module(), *wide, None, **whole)
    (expected,) = torch.autograd.grad(exact.sum(), wide[2])
    torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-2)
