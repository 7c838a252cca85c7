"""Cross-entropy of a frozen output head, on supervised positions only, without ever holding all logits.

Shapes: S supervised positions, H hidden width, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 64 * 2**20
"""Logits of one chunk, in bytes at 4 a logit: 341 positions of a vocabulary of 49,152."""


def chunk_rows(vocab_size: int) -> int:
    """Positions whose logits are computed at once."""
    return max(16, CHUNK_BYTES // (4 * vocab_size))


def sum_cross_entropy(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_S: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Sum of -log p(target) over all positions, a float32 scalar.

    The head gets no gradient (it is frozen under LoRA), so the gradient with respect to the hidden states is known as
    soon as a chunk's logits are: it is computed in the forward pass, and the logits are dropped.

    Args:
        hidden_SH: [S, H], the last hidden states at the positions that predict.
        weight_VH: [V, H], the output head.
        bias_V: [V] or None.
        targets_S: int64 [S].
        logit_scale: Factor on the logits (Cohere, Granite).
        softcap: Logits become softcap · tanh(logit / softcap) (Gemma 2).
    """
    loss: torch.Tensor = _SumCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_SH, weight_VH, bias_V, targets_S, logit_scale, softcap
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
    rows = chunk_rows(weight_VH.shape[0])
    losses = []
    with torch.no_grad():
        for hidden_CH, targets_C in zip(torch.split(hidden_SH, rows), torch.split(targets_S, rows), strict=True):
            logits_CV = head_logits(hidden_CH, weight_VH, bias_V, logit_scale, softcap)
            losses.append(logits_CV.logsumexp(-1) - logits_CV.gather(1, targets_C[:, None])[:, 0])
    return torch.cat(losses) if losses else hidden_SH.new_zeros(0, dtype=torch.float32)


def head_logits(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """Logits of the output head in float32, [C, V]."""
    logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V).float()
    if scale != 1.0:
        logits_CV = logits_CV * scale
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    return logits_CV


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
    ) -> torch.Tensor:
        rows = chunk_rows(weight_VH.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)
        grad_SH = torch.empty_like(hidden_SH)
        for start in range(0, hidden_SH.shape[0], rows):
            chunk = slice(start, start + rows)
            targets_C1 = targets_S[chunk, None]
            logits_CV = head_logits(hidden_SH[chunk], weight_VH, bias_V, scale, softcap)
            log_sum_C1 = logits_CV.logsumexp(-1, keepdim=True)
            total += (log_sum_C1 - logits_CV.gather(1, targets_C1)).sum()
            slope_CV = 1 - (logits_CV / softcap) ** 2 if softcap is not None else None
            grad_CV = logits_CV.sub_(log_sum_C1).exp_()  # softmax, in the logits' memory
            grad_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1, dtype=grad_CV.dtype))
            if slope_CV is not None:
                grad_CV *= slope_CV
            grad_SH[chunk] = (grad_CV.to(weight_VH.dtype) @ weight_VH) * scale
        ctx.save_for_backward(grad_SH)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        return grad_SH * grad_total.to(grad_SH.dtype), None, None, None, None, None
