"""A frozen linear layer with a LoRA adapter, as one operation: y = x·Wᵀ + b + s/(1-p)·((x∘m)·Aᵀ)·Bᵀ.

s is the adapter's scale, p the dropout, and m the mask of kept inputs. The update is added into the layer's output by
the product that computes it (`addmm_`), and so is the adapter's part of the gradient to the input, instead of in
separate passes over [T, O] that compute, scale and add it. Saved for the backward pass are the input, which layers
share, and one byte per element of the mask.

Shapes: T tokens, I inputs, O outputs, R rank; 1 an axis kept for broadcasting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from loratune.model.kernels.dropout import keep_mask

if TYPE_CHECKING:
    from loratune.model.kernels.dropout import AdapterDropout


def lora_linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
    drop: AdapterDropout | None = None,
    narrow: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute the layer's output, [..., O], with gradients to `x`, A and B; W and b are frozen.

    Args:
        x: [..., I], in the type of the frozen weight.
        weight_OI: [O, I].
        bias_O: [O] or None.
        a_RI: [R, I], usually float32; cast to the type of `x`.
        b_OR: [O, R], likewise.
        scale: alpha / r.
        drop: The dropout of the adapter's input; None: there is none.
        narrow: A and B in the type of `x`, where they were cast before; None: they are cast here.
    """
    keep = None if drop is None else keep_mask(x, drop.columns, drop.p)
    out: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, keep, weight_OI, bias_O, a_RI, b_OR, scale if drop is None else scale / (1 - drop.p), narrow
    )
    return out


def lora_update(
    x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, drop: AdapterDropout | None = None
) -> torch.Tensor:
    """Compute only the adapter's update, s/(1-p)·((x∘m)·Aᵀ)·Bᵀ, for a layer that is not a plain linear one.

    Arguments as in `lora_linear`.
    """
    if drop is not None:
        x, scale = torch.where(keep_mask(x, drop.columns, drop.p), x, 0), scale / (1 - drop.p)
    return F.linear(F.linear(x, a_RI.to(x.dtype)), b_OR.to(x.dtype)) * scale


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        keep: torch.Tensor | None,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
        narrow: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        a, b = (a_RI.to(x.dtype), b_OR.to(x.dtype)) if narrow is None else narrow
        h_TR = _kept(x, keep) @ a.T
        y = F.linear(x, weight_OI, bias_O)
        y.view(-1, y.shape[-1]).addmm_(h_TR, b.T, alpha=scale)
        ctx.save_for_backward(x, keep, h_TR, weight_OI, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, keep, h_TR, weight_OI, a, b = ctx.saved_tensors
        grad_TO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_h_TR = (grad_TO @ b).mul_(ctx.scale)
        wide = torch.promote_types(x.dtype, torch.float32)
        grad_a = (grad_h_TR.T @ _kept(x, keep)).to(wide)
        grad_b = (grad_TO.T @ h_TR).to(wide).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_TI = grad_TO @ weight_OI
            if keep is None:
                grad_TI.addmm_(grad_h_TR, a)
            else:
                grad_TI += torch.where(keep.view(grad_TI.shape), grad_h_TR @ a, 0)
            grad_x = grad_TI.view(x.shape)
        return grad_x, None, None, None, grad_a, grad_b, None, None


def _kept(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Return the adapter's input, [T, I], with dropout applied but not yet scaled by 1/(1 - p)."""
    return (x if keep is None else torch.where(keep, x, 0)).reshape(-1, x.shape[-1])
