from __future__ import annotations

import pytest
import torch
from transformers import AttentionMaskInterface

from loratune.model.kernels import attention
from loratune.model.kernels.attention import (
    PACKED,
    PackingUnsupportedError,
    _window_as_mask,
    observe_attention,
    packed_attention,
)

LENGTHS = (5, 1, 9, 3)
BOUNDARIES = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    softcap: float | None,
    scale: float,
    sinks: torch.Tensor | None = None,
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
    weights = scores.masked_fill(~visible, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[:, None, None].exp())
    return (weights / total @ value).transpose(1, 2)


@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 2.0), (4, 2.0), (100, None)])
def test_value_and_gradients_equal_the_definition(
    num_key_heads: int, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, num_key_heads, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out, weights = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        cu_seq_lens_q=BOUNDARIES,
        max_length_q=max(LENGTHS),
        sliding_window=window,
        softcap=softcap,
    )
    expected = reference(query, key, value, window, softcap, 0.3)
    assert weights is None
    tolerance = 1e-10
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(expected)
    actual_gradients = torch.autograd.grad(out, (query, key, value), upstream)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), upstream)
    for actual, wanted in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_values_may_have_another_width_and_heads_a_sink(has_sinks: bool, window: int | None) -> None:
    """DeepSeek's latent attention and gpt-oss."""
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 2, tokens, 8, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 2, tokens, 6, dtype=torch.float64, requires_grad=True)
    whole = {"cu_seq_lens_q": BOUNDARIES, "max_length_q": max(LENGTHS), "sliding_window": window, "s_aux": sinks}
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, scaling=0.3, **whole)
    expected = reference(query, key, value, window, None, 0.3, sinks)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    actual_gradients = torch.autograd.grad(out, (query, key, value), upstream)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), upstream)
    for actual, wanted in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def test_blocks_read_the_boundaries_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them on the device would make the host wait for all that is under way there, once in every layer."""
    x, seen = torch.randn(1, 2, 18, 4), []
    monkeypatch.setattr(attention, "block_attention", lambda q, k, v, boundaries, **_: seen.append(boundaries))
    whole = {"cu_seq_lens_q": BOUNDARIES, "max_length_q": 9}
    packed_attention(torch.nn.Module(), x, x, x, None, **whole)
    packed_attention(torch.nn.Module(), x, x, x, None, cu_seq_lens_k=BOUNDARIES.clone(), **whole)
    assert [boundaries is BOUNDARIES for boundaries in seen] == [True, False]


def test_a_window_of_the_mask_that_a_layer_does_not_name_is_recorded() -> None:
    x = torch.randn(1, 2, 3, 4)
    whole = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    assert PACKED not in AttentionMaskInterface().valid_keys()  # so transformers makes no mask, and asks for no value
    with observe_attention() as observed:
        packed_attention(torch.nn.Module(), x, x, x, _window_as_mask(local_size=7), sliding_window=7, **whole)
        packed_attention(torch.nn.Module(), x, x, x, _window_as_mask(), **whole)
        assert PACKED in AttentionMaskInterface().valid_keys()
        assert observed.mask_only_windows == set()
        packed_attention(torch.nn.Module(), x, x, x, _window_as_mask(local_size=7), **whole)
    assert observed.mask_only_windows == {7}
    assert observed.slow_because == set()


def test_what_the_kernel_does_not_do_is_refused() -> None:
    x = torch.randn(1, 2, 3, 4)
    whole = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    with pytest.raises(PackingUnsupportedError, match="boundaries"):
        packed_attention(torch.nn.Module(), x, x, x, None)
    with pytest.raises(PackingUnsupportedError, match="sinks of the model's attention are trained"):
        packed_attention(torch.nn.Module(), x, x, x, None, s_aux=torch.zeros(2, requires_grad=True), **whole)
    with pytest.raises(PackingUnsupportedError, match="position bias"):
        packed_attention(torch.nn.Module(), x, x, x, None, position_bias=torch.zeros(2), **whole)
    with pytest.raises(PackingUnsupportedError, match="dropout"):
        packed_attention(torch.nn.Module(), x, x, x, None, dropout=0.1, **whole)
