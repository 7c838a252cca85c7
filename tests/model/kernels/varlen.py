"""Substitutes for torch's `varlen_attn`, which runs on CUDA alone: its definition in plain torch, in two signatures.

Torch 2.11 has no `enable_gqa`; torch 2.12 and later refuse fewer key/value heads without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loratune.model.kernels import attention, varlen_attention


def by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scale: float | None, left: int
) -> torch.Tensor:
    """Causal attention of [T, H, D] tensors; `left` is how far back a token sees, -1 without a limit."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    place = torch.arange(query.shape[0])
    example = torch.bucketize(place, ends[1:], right=True)
    visible = (example[:, None] == example[None]) & (place[:, None] >= place[None])
    if left >= 0:
        visible = visible & (place[:, None] - place[None] <= left)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def varlen_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    assert query.shape == key.shape == value.shape, "2.11 documents no shared heads"
    assert window_size[1] == 0, "not causal"
    assert cu_seq_q.dtype == torch.int32
    return by_definition(query, key, value, cu_seq_q, scale, window_size[0])


def varlen_2_12(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor:
    assert enable_gqa or query.shape[1] == key.shape[1], "fewer key/value heads, and enable_gqa is not set"
    assert window_size[1] == 0, "not causal"
    return by_definition(query, key, value, cu_seq_q, scale, window_size[0])


SIGNATURES: dict[str, Callable[..., torch.Tensor]] = {"torch 2.11": varlen_2_11, "torch 2.12": varlen_2_12}


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, varlen: Callable[..., torch.Tensor], *, any_type: bool = True) -> None:
    """Take the way of a GPU on this CPU, with a substitute for torch's kernel.

    Args:
        varlen: The substitute.
        any_type: Whether types and widths that the real kernel lacks are allowed, such as float64.
    """
    monkeypatch.setattr(attention, "_is_on_gpu", lambda query: True)
    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen)
    monkeypatch.setattr(varlen_attention, "_TAKES_SHARED_HEADS", varlen_attention.takes_shared_heads(varlen))
    if any_type:
        real = varlen_attention.varlen_obstacle
        monkeypatch.setattr(
            varlen_attention,
            "varlen_obstacle",
            lambda dtype, q, v, **form: real(torch.bfloat16, 64, 64 + v - q, **form),
        )
