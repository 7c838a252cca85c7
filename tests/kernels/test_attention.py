from __future__ import annotations

import pytest
import torch

from loratune.kernels.attention import PackingUnsupportedError, packed_attention

LENGTHS = (5, 1, 9, 3)


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, softcap: float | None, scale: float
) -> torch.Tensor:
    """Attention by its definition, over the whole row, with a mask that says who sees whom."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    example = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(example))
    visible = (example[:, None] == example[None]) & (place[:, None] >= place[None])
    if window is not None:
        visible &= place[:, None] - place[None] < window
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 2.0), (4, 2.0), (100, None)])
def test_value_and_gradients_equal_the_definition(
    num_key_heads: int, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, num_key_heads, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    out, weights = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        cu_seq_lens_q=boundaries,
        max_length_q=max(LENGTHS),
        sliding_window=window,
        softcap=softcap,
    )
    expected = reference(query, key, value, window, softcap, 0.3)
    assert weights is None
    # the soft-capped path takes its softmax in float32, as the models do
    tolerance = 1e-6 if softcap is not None else 1e-10
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(expected)
    actual_gradients = torch.autograd.grad(out, (query, key, value), upstream)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), upstream)
    for actual, wanted in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=10 * tolerance, atol=10 * tolerance)


def test_what_the_kernel_does_not_do_is_refused() -> None:
    x = torch.randn(1, 2, 3, 4)
    whole = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    with pytest.raises(PackingUnsupportedError, match="boundaries"):
        packed_attention(torch.nn.Module(), x, x, x, None)
    with pytest.raises(PackingUnsupportedError, match="sinks"):
        packed_attention(torch.nn.Module(), x, x, x, None, s_aux=torch.zeros(2), **whole)
    with pytest.raises(PackingUnsupportedError, match="dropout"):
        packed_attention(torch.nn.Module(), x, x, x, None, dropout=0.1, **whole)
