"""A frozen linear layer with a LoRA adapter, as one operation: y = x·Wᵀ + b + s/(1-p)·((x∘m)·Aᵀ)·Bᵀ.

s is the adapter's scale, p the dropout, and m the mask of kept inputs. The update is added into the layer's output by
the product that computes it (`addmm_`), and so is the adapter's part of the gradient to the input, instead of in
separate passes over [T, O] that compute, scale and add it. Saved for the backward pass are the input, which layers
share, and one byte per element of the mask.

Shapes: T tokens, I inputs, O outputs, R rank; 1 an axis kept for broadcasting.
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
    """Compute the layer's output, [..., O], with gradients to `x`, A and B; W and b are frozen.

    Args:
        x: [..., I], in the type of the frozen weight.
        weight_OI: [O, I].
        bias_O: [O] or None.
        a_RI: [R, I], usually float32; cast to the type of `x`.
        b_OR: [O, R], likewise.
        scale: alpha / r.
        dropout: Fraction in [0, 1) of the adapter's inputs that are set to zero; the others are scaled by 1/(1 -
            dropout).
    """
    keep = keep_mask(x, dropout) if dropout else None
    out: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, keep, weight_OI, bias_O, a_RI, b_OR, scale / (1 - dropout)
    )
    return out


def lora_update(
    x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Compute only the adapter's update, s/(1-p)·((x∘m)·Aᵀ)·Bᵀ, for a layer that is not a plain linear one.

    Arguments as in `lora_linear`.
    """
    kept = torch.where(keep_mask(x, dropout), x, 0) if dropout else x
    return F.linear(F.linear(kept, a_RI.to(x.dtype)), b_OR.to(x.dtype)) * (scale / (1 - dropout))


def keep_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Return a boolean mask shaped like `x`, true with probability 1 - `dropout`, from torch's default generator."""
    if x.device.type != "cpu":
        return torch.rand(x.shape, device=x.device) >= dropout
    # A CPU's generator is sequential, so only one number per row and per column is drawn, and an element gets a hash of
    # the two. Compiled code fuses the hash into its use; eager mode computes the same mask in pieces that fit a cache.
    num_columns = x.shape[-1]
    drawn: torch.Tensor = _draw(x, x.numel() // num_columns + num_columns)
    by_column, by_row = drawn[:num_columns], drawn[num_columns:]
    mask = _hash_mask if torch.compiler.is_compiling() else _mask_in_pieces
    return mask(by_row[:, None], by_column, round(dropout * 2**32) - 2**31).view(x.shape)


@torch.library.custom_op("loratune::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw(x: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty(number, dtype=torch.int32, device=x.device).random_(-(2**31), 2**31)


@_draw.register_fake
def _(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.new_empty(number, dtype=torch.int32)


_FACTORS = (-0x61C88647, -0x7A143589)
"""Odd multipliers: 2³² over the golden ratio (Knuth, TAOCP, section 6.4), and a prime of xxHash32."""


def _hash_mask(by_row_T1: torch.Tensor, by_column_I: torch.Tensor, threshold: int) -> torch.Tensor:
    hashed = (by_row_T1 ^ by_column_I) * _FACTORS[0]
    hashed = (hashed ^ ((hashed >> 15) & 0x1FFFF)) * _FACTORS[1]
    return hashed >= threshold


_PIECE = 2**16
"""Elements of a piece; its int32 numbers fit into the L2 cache of a core."""


def _mask_in_pieces(by_row_T1: torch.Tensor, by_column_I: torch.Tensor, threshold: int) -> torch.Tensor:
    num_rows, num_columns = by_row_T1.shape[0], by_column_I.shape[0]
    step = max(1, _PIECE // num_columns)
    mask = torch.empty(num_rows, num_columns, dtype=torch.bool)
    hashed = torch.empty(min(step, num_rows), num_columns, dtype=torch.int32)
    shifted = torch.empty_like(hashed)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        h, s = hashed[: rows.stop - start], shifted[: rows.stop - start]
        torch.bitwise_xor(by_row_T1[rows], by_column_I, out=h).mul_(_FACTORS[0])
        torch.bitwise_right_shift(h, 15, out=s).bitwise_and_(0x1FFFF)
        torch.ge(h.bitwise_xor_(s).mul_(_FACTORS[1]), threshold, out=mask[rows])
    return mask


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
    """Return the adapter's input, [T, I], with dropout applied but not yet scaled by 1/(1 - p)."""
    return (x if keep is None else torch.where(keep, x, 0)).reshape(-1, x.shape[-1])
