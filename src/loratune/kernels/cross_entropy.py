"""Cross-entropy of an output head, on supervised positions only, without ever holding all logits.

Shapes: S supervised positions, H hidden width, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
"""Logits of one chunk, in bytes at 4 a logit. On two CPU cores 1,650 positions of a vocabulary of 49,152 took 876, 682, 594
and 672 ms compiled with chunks of 8, 16, 32 and 64 MiB. Those of GPUs are estimates."""


Chunk = Callable[..., tuple[torch.Tensor, ...]]


def chunk_rows(vocab_size: int, device: str) -> int:
    """Positions whose logits are computed at once on a type of device."""
    return max(16, CHUNK_BYTES[device] // (4 * vocab_size))


def sum_cross_entropy(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_S: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Sum of -log p(target) over all positions, a float32 scalar.

    The gradient with respect to the hidden states, and to the head where it is trained, is known as soon as a chunk's logits
    are: it is computed in the forward pass, and the logits are dropped.

    Args:
        hidden_SH: [S, H], the last hidden states at the positions that predict.
        weight_VH: [V, H], the output head. One of another type than `hidden_SH` is computed with in the type of that; its
            gradient is summed in float32.
        bias_V: [V] or None.
        targets_S: int64 [S].
        logit_scale: Factor on the logits (Cohere, Granite).
        softcap: Logits become softcap · tanh(logit / softcap) (Gemma 2).
        compiled: Whether a chunk is computed by compiled code.
    """
    trained = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
    part = _trained_chunk if trained else _chunk
    chunk = _compiled(part) if compiled else part
    loss: torch.Tensor = _SumCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_SH, weight_VH, bias_V, targets_S, logit_scale, softcap, chunk
    )
    return loss


def cross_entropy_per_token(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_S: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """-log p(target) of each position, float32 [S], without a gradient. Arguments as in `sum_cross_entropy`."""
    rows = chunk_rows(weight_VH.shape[0], weight_VH.device.type)
    losses = []
    with torch.no_grad():
        for hidden_CH, targets_C in zip(torch.split(hidden_SH, rows), torch.split(targets_S, rows), strict=True):
            logits_CV = head_logits(hidden_CH, weight_VH, bias_V, logit_scale, softcap)
            losses.append(logits_CV.logsumexp(-1) - logits_CV.gather(1, targets_C[:, None])[:, 0])
    return torch.cat(losses) if losses else hidden_SH.new_zeros(0, dtype=torch.float32)


@cache
def _compiled(chunk: Chunk) -> Chunk:
    return torch.compile(chunk, dynamic=True)


def head_logits(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """Logits of the output head in float32, [C, V]."""
    dtype = hidden_CH.dtype
    bias_V = None if bias_V is None else bias_V.to(dtype)
    logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH.to(dtype), bias_V).float()
    if scale != 1.0:
        logits_CV = logits_CV * scale
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    return logits_CV


def _chunk(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_C: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of each target, float32 [C], and the gradient of their sum to the hidden states, [C, H]."""
    losses_C, grad_CV = _logit_gradients(hidden_CH, weight_VH, bias_V, targets_C, scale, softcap)
    return losses_C, (grad_CV @ weight_VH) * scale


def _trained_chunk(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_C: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, ...]:
    """The same, and the gradients to the head's weight, [V, H], and bias, [V]."""
    weight_VH = weight_VH.to(hidden_CH.dtype)
    losses_C, grad_CV = _logit_gradients(hidden_CH, weight_VH, bias_V, targets_C, scale, softcap)
    return losses_C, (grad_CV @ weight_VH) * scale, (grad_CV.T @ hidden_CH) * scale, grad_CV.float().sum(0) * scale


def _logit_gradients(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_C: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of each target, float32 [C], and the gradient of their sum to the scaled and capped logits' input, [C, V]."""
    targets_C1 = targets_C[:, None]
    logits_CV = head_logits(hidden_CH, weight_VH, bias_V, scale, softcap)
    slope_CV = 1 - (logits_CV / softcap) ** 2 if softcap is not None else None
    logits_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
    target_C1 = logits_CV.gather(1, targets_C1)
    exponentials_CV = logits_CV.exp_()
    total_C1 = exponentials_CV.sum(-1, keepdim=True)
    losses_C1 = total_C1.log() - target_C1
    grad_CV = exponentials_CV.mul_(1 / total_C1).to(weight_VH.dtype)
    # p - 1 of the target, exact where p is near 1 and the narrow type has no digits left for the difference
    grad_CV.scatter_(1, targets_C1, torch.expm1(-losses_C1).to(grad_CV.dtype))
    if slope_CV is not None:
        grad_CV = grad_CV * slope_CV.to(grad_CV.dtype)
    return losses_C1[:, 0], grad_CV


class _SumCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        scale: float,
        softcap: float | None,
        chunk: Chunk,
    ) -> torch.Tensor:
        rows = chunk_rows(weight_VH.shape[0], weight_VH.device.type)
        total = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)
        grad_SH = torch.empty_like(hidden_SH)
        trains_weight, trains_bias = ctx.needs_input_grad[1:3]
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if trains_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if trains_bias and bias_V is not None else None
        for start in range(0, hidden_SH.shape[0], rows):
            part = slice(start, start + rows)
            losses_C, grad_SH[part], *of_head = chunk(
                hidden_SH[part], weight_VH, bias_V, targets_S[part], scale, softcap
            )
            total += losses_C.sum()
            if grad_VH is not None:
                grad_VH += of_head[0]
            if grad_V is not None:
                grad_V += of_head[1]
        ctx.save_for_backward(grad_SH)
        ctx.of_head = grad_VH, grad_V
        ctx.types = weight_VH.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        (grad_VH, grad_V), ctx.of_head = ctx.of_head, (None, None)  # large: scaled in place, and given away
        return (
            grad_SH * grad_total.to(grad_SH.dtype),
            None if grad_VH is None else grad_VH.mul_(grad_total).to(ctx.types[0]),
            None if grad_V is None else grad_V.mul_(grad_total).to(ctx.types[1]),
            *(None, None, None, None),
        )
