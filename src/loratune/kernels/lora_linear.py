"""A frozen linear layer with a LoRA adapter, as one operation: y = x·Wᵀ + b + s/(1-p)·((x∘m)·Aᵀ)·Bᵀ, m the kept inputs.

The update is added into the layer's own output while that is being written, and so is the adapter's part of the
gradient to the input, instead of being made, scaled and added in passes of their own over [T, O]. What is saved is the input,
which layers share, and one byte an element of the mask.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def lora_linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The layer's output, with gradients to `x`, A and B. W and b are frozen.

    Args:
        x: [..., I], in the type of the frozen weight.
        weight_OI: [O, I].
        bias_O: [O] or None.
        a_RI: [R, I], usually float32; multiplied in the type of `x`.
        b_OR: [O, R], likewise.
        scale: alpha / r.
        dropout: The fraction of the adapter's inputs that is set to zero; the others count 1/(1 - dropout).
    """
    keep = keep_mask(x, dropout) if dropout else None
    out: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, keep, weight_OI, bias_O, a_RI, b_OR, scale / (1 - dropout)
    )
    return out


def lora_update(
    x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """What the adapter adds to a layer that is no plain linear one: s/(1-p)·((x∘m)·Aᵀ)·Bᵀ; arguments as in `lora_linear`."""
    kept = torch.where(keep_mask(x, dropout), x, 0) if dropout else x
    return F.linear(F.linear(kept, a_RI.to(x.dtype)), b_OR.to(x.dtype)) * (scale / (1 - dropout))


def keep_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Boolean, shaped like `x`, true with probability 1 - `dropout`, from torch's default generator."""
    if x.device.type == "cpu":
        mask: torch.Tensor = _keep_mask_cpu(x, round(dropout * 2**16))
        return mask
    return torch.rand(x.shape, device=x.device) >= dropout


@torch.library.custom_op("loratune::keep_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _keep_mask_cpu(x: torch.Tensor, dropped_of_65536: int) -> torch.Tensor:
    """Four 16-bit draws of each 64-bit one: `bernoulli_` takes 4.8 ms for a million elements on one core, this 1.1."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= dropped_of_65536 - 2**15).view(x.shape)


@_keep_mask_cpu.register_fake
def _(x: torch.Tensor, dropped_of_65536: int) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.bool)


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
    ) -> torch.Tensor:
        a, b = a_RI.to(x.dtype), b_OR.to(x.dtype)
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
        return grad_x, None, None, None, grad_a, grad_b, None


def _kept(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The adapter's input, [T, I], not yet scaled up."""
    return (x if keep is None else torch.where(keep, x, 0)).reshape(-1, x.shape[-1])
