"""A frozen linear layer with a LoRA adapter, as one operation: y = x·Wᵀ + b + s·(z·Aᵀ)·Bᵀ.

The update is added into the layer's own output while that is being written, and so is the adapter's part of the
gradient to the input, instead of being made, scaled and added in passes of their own over [T, O].

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def lora_linear(
    x: torch.Tensor,
    dropped_x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The layer's output, with gradients to `x`, `dropped_x`, A and B. W and b are frozen.

    Args:
        x: [..., I], in the type of the frozen weight.
        dropped_x: [..., I], the adapter's input: `x` itself where nothing is dropped.
        weight_OI: [O, I].
        bias_O: [O] or None.
        a_RI: [R, I], usually float32; multiplied in the type of `x`.
        b_OR: [O, R], likewise.
        scale: alpha / r.
    """
    out: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, None if dropped_x is x else dropped_x, weight_OI, bias_O, a_RI, b_OR, scale
    )
    return out


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped_x: torch.Tensor | None,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        adapter_x = x if dropped_x is None else dropped_x
        a, b = a_RI.to(x.dtype), b_OR.to(x.dtype)
        z_TI = adapter_x.reshape(-1, x.shape[-1])
        h_TR = z_TI @ a.T
        y = F.linear(x, weight_OI, bias_O)
        y.view(-1, y.shape[-1]).addmm_(h_TR, b.T, alpha=scale)
        ctx.save_for_backward(z_TI, h_TR, weight_OI, a, b)
        ctx.scale, ctx.dropped = scale, dropped_x is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z_TI, h_TR, weight_OI, a, b = ctx.saved_tensors
        grad_TO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_h_TR = (grad_TO @ b).mul_(ctx.scale)
        grad_a = (grad_h_TR.T @ z_TI).float() if a.dtype != torch.float64 else grad_h_TR.T @ z_TI
        grad_b = (grad_TO.T @ h_TR).to(grad_a.dtype).mul_(ctx.scale)
        grad_x_TI = grad_TO @ weight_OI if ctx.needs_input_grad[0] else None
        grad_dropped_TI = None
        if ctx.dropped:
            grad_dropped_TI = grad_h_TR @ a if ctx.needs_input_grad[1] else None
        elif grad_x_TI is not None:
            grad_x_TI.addmm_(grad_h_TR, a)
        shape = (*grad_y.shape[:-1], weight_OI.shape[1])
        return (
            None if grad_x_TI is None else grad_x_TI.view(shape),
            None if grad_dropped_TI is None else grad_dropped_TI.view(shape),
            None,
            None,
            grad_a,
            grad_b,
            None,
        )
