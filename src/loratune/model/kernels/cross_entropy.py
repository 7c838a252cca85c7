"""Cross-entropy of an output head, on supervised positions only, without ever holding all logits.

Shapes: S supervised positions, H hidden width, V vocabulary, C positions of one chunk, N trained rows of a frozen head;
1 an axis kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30, "mps": 128 * 2**20}
"""Device type → the most bytes of one chunk's logits in float32. On two CPU cores 1,650 positions of a vocabulary of
49,152 took 876, 682, 594 and 672 ms compiled with chunks of 8, 16, 32 and 64 MiB. Compiled code of a GPU holds them in
bfloat16 alone, twice; the value for MPS is an estimate."""

GPU_ROWS = 1408
"""Rows of a chunk on a GPU if they fit into its bytes: with hidden states of 1,536, the product that leads to them from
the logits has 11 × 12 tiles of 128 × 128, one for each of an H100's 132 processors. By arithmetic, and half of what
tiles of 256 columns would want, since a small GPU must hold them too; `benchmarks/gpu/run.sh` times several sizes."""

MIN_CHUNK_POSITIONS = 16

TILE_ROWS = 128
"""Rows of a tile in matrix products on a GPU; a chunk of another size computes its last tile in part for nothing."""

SIZES_IN_CODE = {"cuda"}
"""Device types whose compiled code has the sizes of vocabulary and hidden states in it, not only the number of
positions as a variable: with a variable vocabulary, torch writes a softmax that reads the logits once more."""

Chunk = Callable[..., Any]


class Head(NamedTuple):
    """An output head: softcap · tanh(logits / softcap) of logits = logit_scale · (hidden · weightᵀ + bias).

    A named tuple, since compiled code takes one apart without guards of its own.

    Attributes:
        weight_VH: [V, H]. Of another type than the hidden states, it is cast to theirs; its gradient is summed in
            float32.
        bias_V: [V] or None.
        rows_NH: [N, H]: trained rows that replace some of a frozen head without bias (`lora.new_tokens`); None: no
            rows.
        numbers_N: int64 [N], ascending: which rows of `weight_VH` these replace.
        logit_scale: Factor on the logits (Cohere, Granite).
        softcap: Soft cap of the logits (Gemma 2); None: no cap.
    """

    weight_VH: torch.Tensor  # noqa: N815 - a shape
    bias_V: torch.Tensor | None = None  # noqa: N815
    rows_NH: torch.Tensor | None = None  # noqa: N815
    numbers_N: torch.Tensor | None = None  # noqa: N815
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def is_trained(self) -> bool:
        """Whether a part of the head needs a gradient."""
        parts = (self.weight_VH, self.bias_V, self.rows_NH)
        return any(part is not None and part.requires_grad for part in parts)


def chunk_rows(vocab_size: int, device: str) -> int:
    """Return how many positions' logits are computed at once on a type of device."""
    rows = CHUNK_BYTES[device] // (4 * vocab_size)
    if device == "cuda" and rows > TILE_ROWS:
        rows = min(GPU_ROWS, rows - rows % TILE_ROWS)
    return max(MIN_CHUNK_POSITIONS, rows)


def sum_cross_entropy(
    hidden_SH: torch.Tensor,
    head: Head,
    targets_S: torch.Tensor,
    *,
    smoothing: float = 0.0,
    compiled: bool = False,
    each_S: torch.Tensor | None = None,
    counts_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the cross-entropy over all positions; return a float32 scalar with a gradient.

    A position's loss is -log p(target), and with smoothing ε it is (1 - ε)·(-log p(target)) + ε·mean over the
    vocabulary of -log p (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    The gradients with respect to the hidden states, and to the head where it is trained, follow from a chunk's logits
    alone. So the forward pass computes them while it has the logits, and then drops the logits.

    Args:
        hidden_SH: [S, H], the last hidden states at the positions that predict.
        head: The output head.
        targets_S: int64 [S].
        smoothing: ε in [0, 1), the part of the target that is spread evenly over the vocabulary.
        compiled: Whether to compute a chunk with compiled code.
        each_S: float32 [S], filled with the loss of each position.
        counts_S: float32 [S], how often each position counts in the sum; the head must be frozen. None: once.
    """
    assert counts_S is None or not head.is_trained, "the output head is trained"
    chunk = _chunk_of(head, smoothing, compiled=compiled)
    # Tensors with a gradient must be arguments of their own: autograd does not look into `head`.
    loss: torch.Tensor = _SumCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_SH, head.weight_VH, head.bias_V, head.rows_NH, targets_S, chunk, each_S, counts_S
    )
    return loss


def cross_entropy_each(
    hidden_SH: torch.Tensor, head: Head, targets_S: torch.Tensor, *, compiled: bool = False
) -> torch.Tensor:
    """Return -log p(target) of each position, float32 [S], with a gradient to the hidden states.

    For losses that are functions of these (preferences). A position's loss depends on its own hidden state alone, so
    the forward pass keeps the gradient of each, and the backward pass scales it by what the loss asks for; no logits
    are kept, and none are computed again.

    Args:
        hidden_SH: [S, H], the last hidden states at the positions that predict.
        head: The output head, which must be frozen: its gradient would need the scales in the forward pass.
        targets_S: int64 [S].
        compiled: Whether to compute a chunk with compiled code.
    """
    assert not head.is_trained, "the output head is trained"
    chunk = _chunk_of(head, 0.0, compiled=compiled)
    losses: torch.Tensor = _CrossEntropyEach.apply(hidden_SH, targets_S, head, chunk)  # type: ignore[no-untyped-call]
    return losses


def cross_entropy_per_token(hidden_SH: torch.Tensor, head: Head, targets_S: torch.Tensor) -> torch.Tensor:
    """Return -log p(target) of each position, float32 [S], without smoothing and without a gradient.

    Arguments as in `sum_cross_entropy`.
    """
    positions = chunk_rows(head.weight_VH.shape[0], head.weight_VH.device.type)
    losses = []
    with torch.no_grad():
        for hidden_CH, targets_C in zip(
            torch.split(hidden_SH, positions), torch.split(targets_S, positions), strict=True
        ):
            logits_CV = head_logits(hidden_CH, head)
            losses.append(logits_CV.logsumexp(-1) - logits_CV.gather(1, targets_C[:, None])[:, 0])
    return torch.cat(losses) if losses else hidden_SH.new_zeros(0, dtype=torch.float32)


@cache
def _compiled_chunk() -> Chunk:
    return torch.compile(_chunk, dynamic=True)


def _chunk_of(head: Head, smoothing: float, *, compiled: bool) -> Chunk:
    """Return the function of a chunk's hidden states, targets and wanted gradients."""
    chunk = partial(_compiled_chunk() if compiled else _chunk, head=head, smoothing=smoothing)
    if not compiled or head.weight_VH.device.type not in SIZES_IN_CODE:
        return chunk
    torch._dynamo.mark_static(head.weight_VH)

    def with_sizes(hidden_CH: torch.Tensor, *rest: Any) -> Any:
        torch._dynamo.mark_static(hidden_CH, 1)
        return chunk(hidden_CH, *rest)

    return with_sizes


def head_logits(hidden_CH: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the logits of the output head, float32 [C, V]; the product itself runs in the type of `hidden_CH`."""
    dtype = hidden_CH.dtype
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    logits_CV = torch.nn.functional.linear(hidden_CH, head.weight_VH.to(dtype), bias_V)
    if head.rows_NH is not None and head.numbers_N is not None:
        logits_CV.index_copy_(1, head.numbers_N, hidden_CH @ head.rows_NH.to(dtype).T)
    logits_CV = logits_CV.float()
    if head.logit_scale != 1.0:
        logits_CV = logits_CV * head.logit_scale
    if head.softcap is not None:
        logits_CV = head.softcap * torch.tanh(logits_CV / head.softcap)
    return logits_CV


def _chunk(
    hidden_CH: torch.Tensor,
    targets_C: torch.Tensor,
    trains: tuple[bool, bool, bool],
    *,
    head: Head,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Compute the losses of a chunk, float32 [C], and the gradients of their sum.

    Args:
        hidden_CH: [C, H].
        targets_C: int64 [C].
        trains: Whether weight, bias and rows of the head need a gradient.
        head: As in `sum_cross_entropy`.
        smoothing: As in `sum_cross_entropy`.

    Returns:
        The losses, and the gradients to the hidden states [C, H], to weight, bias and rows; None for the untrained.
    """
    scale, softcap, rows_NH, numbers_N = head.logit_scale, head.softcap, head.rows_NH, head.numbers_N
    targets_C1 = targets_C[:, None]
    logits_CV = head_logits(hidden_CH, head)
    slope_CV = 1 - (logits_CV / softcap) ** 2 if softcap is not None else None
    # softmax in place, in the one [C, V] buffer: exp(logit - max) / sum
    logits_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
    target_C1 = logits_CV.gather(1, targets_C1)
    mean_C1 = logits_CV.mean(-1, keepdim=True) if smoothing else None
    exponentials_CV = logits_CV.exp_()
    total_C1 = exponentials_CV.sum(-1, keepdim=True)
    losses_C1 = total_C1.log() - target_C1
    grad_CV = exponentials_CV.mul_(1 / total_C1)
    # p - 1 of the target, exact where p is near 1 and a narrow type has no digits left for the difference
    grad_C1 = torch.expm1(-losses_C1)
    if mean_C1 is not None:
        even = smoothing / head.weight_VH.shape[0]
        grad_CV, grad_C1 = grad_CV.sub_(even), grad_C1 + (smoothing - even)
        losses_C1 = losses_C1 + smoothing * (target_C1 - mean_C1)
    grad_CV = grad_CV.to(hidden_CH.dtype)
    grad_CV.scatter_(1, targets_C1, grad_C1.to(grad_CV.dtype))
    if slope_CV is not None:
        grad_CV = grad_CV * slope_CV.to(grad_CV.dtype)
    grad_bias_V = grad_CV.float().sum(0) * scale if trains[1] else None
    grad_rows_NH, through_rows_CH = None, None
    if rows_NH is not None and numbers_N is not None:
        grad_CN = grad_CV[:, numbers_N]
        grad_CV = grad_CV.index_fill(1, numbers_N, 0)  # the rows of `weight_VH` that are replaced made no logit
        grad_rows_NH = (grad_CN.T @ hidden_CH) * scale if trains[2] else None
        through_rows_CH = grad_CN @ rows_NH.to(hidden_CH.dtype)
    grad_VH = (grad_CV.T @ hidden_CH) * scale if trains[0] else None
    grad_CH = grad_CV @ head.weight_VH.to(hidden_CH.dtype)
    if through_rows_CH is not None:
        grad_CH = grad_CH + through_rows_CH
    if scale != 1.0:  # compiled code would multiply by 1 in a pass of its own
        grad_CH = grad_CH * scale
    return losses_C1[:, 0], grad_CH, grad_VH, grad_bias_V, grad_rows_NH


class _SumCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        rows_NH: torch.Tensor | None,
        targets_S: torch.Tensor,
        chunk: Chunk,
        each_S: torch.Tensor | None,
        counts_S: torch.Tensor | None,
    ) -> torch.Tensor:
        positions = chunk_rows(weight_VH.shape[0], weight_VH.device.type)
        total = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)
        grad_SH = torch.empty_like(hidden_SH)
        head = (weight_VH, bias_V, rows_NH)
        trains = tuple(ctx.needs_input_grad[1:4])
        head_grads = [
            torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
            if trained and part is not None
            else None
            for part, trained in zip(head, trains, strict=True)
        ]
        for start in range(0, hidden_SH.shape[0], positions):
            part = slice(start, start + positions)
            losses_C, grad_SH[part], *grads = chunk(hidden_SH[part], targets_S[part], trains)
            if each_S is not None:
                each_S[part] = losses_C
            if counts_S is not None:
                losses_C = losses_C * counts_S[part]
                grad_SH[part] *= counts_S[part, None].to(grad_SH.dtype)
            total += losses_C.sum()
            for accumulated, grad in zip(head_grads, grads, strict=True):
                if accumulated is not None:
                    accumulated.add_(grad)
        ctx.save_for_backward(grad_SH)
        ctx.head_grads, ctx.types = head_grads, [None if part is None else part.dtype for part in head]
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        head_grads, ctx.head_grads = ctx.head_grads, None  # as large as the head: scaled in place and handed over
        scaled = [
            None if grad is None else grad.mul_(grad_total).to(dtype)
            for grad, dtype in zip(head_grads, ctx.types, strict=True)
        ]
        return grad_SH * grad_total.to(grad_SH.dtype), *scaled, None, None, None, None


class _CrossEntropyEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SH: torch.Tensor, targets_S: torch.Tensor, head: Head, chunk: Chunk) -> torch.Tensor:
        positions = chunk_rows(head.weight_VH.shape[0], hidden_SH.device.type)
        losses_S = torch.empty(len(targets_S), dtype=torch.float32, device=hidden_SH.device)
        grad_SH = torch.empty_like(hidden_SH)
        for start in range(0, len(targets_S), positions):
            part = slice(start, start + positions)
            losses_S[part], grad_SH[part], *_ = chunk(hidden_SH[part], targets_S[part], (False, False, False))
        ctx.save_for_backward(grad_SH)
        return losses_S

    @staticmethod
    def backward(ctx: Any, grad_S: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        return grad_SH * grad_S.to(grad_SH.dtype)[:, None], None, None, None
