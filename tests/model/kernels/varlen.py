"""Substitutes for torch's `varlen_attn`, which runs on CUDA alone: its definition in plain torch, in two signatures.

Torch 2.11 has no `enable_gqa`; torch 2.12 and later refuse fewer key/value heads without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loratune.model.kernels import attention, varlen_attention


def probabilities(query: torch.Tensor, key: torch.Tensor, ends: torch.Tensor, scale: float, left: int) -> torch.Tensor:
    """The causal softmax of [T, H, D] tensors, [H, T, T]; `left` is how far back a token sees, -1 without a limit."""
    place = torch.arange(query.shape[0])
    example = torch.bucketize(place, ends[1:], right=True)
    behind = place[:, None] - place[None]
    visible = (example[:, None] == example[None]) & (behind >= 0) & ((behind <= left) | (left < 0))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def expanded(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


@torch.library.custom_op("loratune_tests::varlen", mutates_args=())
def opaque(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float,
    left: int,
) -> torch.Tensor:
    """An operator as torch's own: the compiler sees shapes and an integer, and nothing of what is inside."""
    weights = probabilities(query, expanded(key, query), ends, scale, left)
    return torch.einsum("hqk,khd->qhd", weights, expanded(value, query)).contiguous()


@torch.library.custom_op("loratune_tests::varlen_backward", mutates_args=())
def opaque_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = expanded(key, query), expanded(value, query)
    weights = probabilities(query, keys, ends, scale, left)
    grad_weights = torch.einsum("qhd,khd->hqk", grad, values)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    grad_keys = torch.einsum("hqk,qhd->khd", grad_scores, query)
    grad_values = torch.einsum("hqk,qhd->khd", weights, grad)
    shape = (*key.shape[:2], -1, key.shape[2])  # the heads that share a key: their gradients add up
    return (
        torch.einsum("hqk,khd->qhd", grad_scores, keys).contiguous(),
        grad_keys.reshape(shape).sum(2).contiguous(),
        grad_values.reshape(shape).sum(2).contiguous(),
    )


@opaque.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


@opaque_backward.register_fake
def _(grad: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x) for x in inputs[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[5:]


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*opaque_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None)


opaque.register_autograd(_differentiate, setup_context=_keep)


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
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return opaque(query, key, value, cu_seq_q, max_q, scale, window_size[0])


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
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return opaque(query, key, value, cu_seq_q, max_q, scale, window_size[0])


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
