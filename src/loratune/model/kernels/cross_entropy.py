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


Chunk = Callable[..., Any]


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
    rows_NH: torch.Tensor | None = None,
    numbers_N: torch.Tensor | None = None,
    smoothing: float = 0.0,
    compiled: bool = False,
    each_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropy over all positions, a float32 scalar: of -log p(target), and with smoothing ε of
    (1 - ε)·(-log p(target)) + ε·mean over the vocabulary of -log p (Szegedy et al. 2016, arXiv 1512.00567, section 7).

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
        rows_NH: [N, H]: what stands in the place of some rows of a frozen head without bias, and has a gradient.
        numbers_N: int64 [N]: which rows these are.
        smoothing: ε, the part of the target that is spread evenly over the vocabulary.
        compiled: Whether a chunk is computed by compiled code.
        each_S: float32 [S], filled with what is summed; None where nobody asks.
    """
    loss: torch.Tensor = _SumCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_SH,
        weight_VH,
        bias_V,
        rows_NH,
        numbers_N,
        targets_S,
        logit_scale,
        softcap,
        smoothing,
        _compiled_chunk() if compiled else _chunk,
        each_S,
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
    rows_NH: torch.Tensor | None = None,
    numbers_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log p(target) of each position, float32 [S], without smoothing and without a gradient. Arguments as in
    `sum_cross_entropy`."""
    rows = chunk_rows(weight_VH.shape[0], weight_VH.device.type)
    losses = []
    with torch.no_grad():
        for hidden_CH, targets_C in zip(torch.split(hidden_SH, rows), torch.split(targets_S, rows), strict=True):
            logits_CV = head_logits(hidden_CH, weight_VH, bias_V, logit_scale, softcap, rows_NH, numbers_N)
            losses.append(logits_CV.logsumexp(-1) - logits_CV.gather(1, targets_C[:, None])[:, 0])
    return torch.cat(losses) if losses else hidden_SH.new_zeros(0, dtype=torch.float32)


@cache
def _compiled_chunk() -> Chunk:
    return torch.compile(_chunk, dynamic=True)


def head_logits(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    rows_NH: torch.Tensor | None = None,
    numbers_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of the output head in float32, [C, V]; arguments as in `sum_cross_entropy`."""
    dtype = hidden_CH.dtype
    bias_V = None if bias_V is None else bias_V.to(dtype)
    logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH.to(dtype), bias_V)
    if rows_NH is not None and numbers_N is not None:
        logits_CV.index_copy_(1, numbers_N, hidden_CH @ rows_NH.to(dtype).T)
    logits_CV = logits_CV.float()
    if scale != 1.0:
        logits_CV = logits_CV * scale
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    return logits_CV


def _chunk(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    rows_NH: torch.Tensor | None,
    numbers_N: torch.Tensor | None,
    targets_C: torch.Tensor,
    scale: float,
    softcap: float | None,
    smoothing: float,
    trains: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The loss of each position, float32 [C]; the gradients of their sum to the hidden states, [C, H], and of weight, bias and rows to
    those that have one, as `trains` says."""
    targets_C1 = targets_C[:, None]
    logits_CV = head_logits(hidden_CH, weight_VH, bias_V, scale, softcap, rows_NH, numbers_N)
    slope_CV = 1 - (logits_CV / softcap) ** 2 if softcap is not None else None
    logits_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
    target_C1 = logits_CV.gather(1, targets_C1)
    mean_C1 = logits_CV.mean(-1, keepdim=True) if smoothing else None
    exponentials_CV = logits_CV.exp_()
    total_C1 = exponentials_CV.sum(-1, keepdim=True)
    losses_C1 = total_C1.log() - target_C1
    grad_CV = exponentials_CV.mul_(1 / total_C1)
    # p - 1 of the target, exact where p is near 1 and the narrow type has no digits left for the difference
    grad_C1 = torch.expm1(-losses_C1)
    if mean_C1 is not None:
        even = smoothing / weight_VH.shape[0]
        grad_CV, grad_C1 = grad_CV.sub_(even), grad_C1 + (smoothing - even)
        losses_C1 = losses_C1 + smoothing * (target_C1 - mean_C1)
    grad_CV = grad_CV.to(hidden_CH.dtype)
    grad_CV.scatter_(1, targets_C1, grad_C1.to(grad_CV.dtype))
    if slope_CV is not None:
        grad_CV = grad_CV * slope_CV.to(grad_CV.dtype)
    grad_bias_V = grad_CV.float().sum(0) * scale if trains[1] else None
    grad_rows_NH, of_rows_CH = None, None
    if rows_NH is not None and numbers_N is not None:
        grad_CN = grad_CV[:, numbers_N]
        grad_CV = grad_CV.index_fill(1, numbers_N, 0)
        grad_rows_NH = (grad_CN.T @ hidden_CH) * scale if trains[2] else None
        of_rows_CH = grad_CN @ rows_NH.to(hidden_CH.dtype)
    grad_VH = (grad_CV.T @ hidden_CH) * scale if trains[0] else None
    grad_CH = grad_CV @ weight_VH.to(hidden_CH.dtype)
    if of_rows_CH is not None:
        grad_CH = grad_CH + of_rows_CH
    return losses_C1[:, 0], grad_CH * scale, grad_VH, grad_bias_V, grad_rows_NH


class _SumCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        rows_NH: torch.Tensor | None,
        numbers_N: torch.Tensor | None,
        targets_S: torch.Tensor,
        scale: float,
        softcap: float | None,
        smoothing: float,
        chunk: Chunk,
        each_S: torch.Tensor | None,
    ) -> torch.Tensor:
        positions = chunk_rows(weight_VH.shape[0], weight_VH.device.type)
        total = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)
        grad_SH = torch.empty_like(hidden_SH)
        head = (weight_VH, bias_V, rows_NH)
        trains = tuple(ctx.needs_input_grad[1:4])
        of_head = [
            torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
            if trained and part is not None
            else None
            for part, trained in zip(head, trains, strict=True)
        ]
        for start in range(0, hidden_SH.shape[0], positions):
            part = slice(start, start + positions)
            losses_C, grad_SH[part], *grads = chunk(
                hidden_SH[part], *head, numbers_N, targets_S[part], scale, softcap, smoothing, trains
            )
            total += losses_C.sum()
            if each_S is not None:
                each_S[part] = losses_C
            for whole, grad in zip(of_head, grads, strict=True):
                if whole is not None:
                    whole.add_(grad)
        ctx.save_for_backward(grad_SH)
        ctx.of_head, ctx.types = of_head, [None if part is None else part.dtype for part in head]
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        of_head, ctx.of_head = ctx.of_head, None  # as large as the head: scaled in place, and given away
        scaled = [
            None if grad is None else grad.mul_(grad_total).to(dtype)
            for grad, dtype in zip(of_head, ctx.types, strict=True)
        ]
        return grad_SH * grad_total.to(grad_SH.dtype), *scaled, None, None, None, None, None, None, None
