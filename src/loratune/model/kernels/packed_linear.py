"""A frozen linear layer whose weight is a packed tensor of torchao: y = x·Wᵀ + b, and the gradient to x.

The output is torchao's own. Left to autograd, every unpacked weight would be kept from the forward to the backward
pass, and a step would hold the entire base in 16 or 32 bits. Here the packed weight is kept, and unpacked again.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class PackedLinear(torch.nn.Linear):
    """The class that a `torch.nn.Linear` gets once its weight is packed (`model.patching`)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name of torch
        """Map [..., I] to [..., O] in the type of `input`, with a gradient to it."""
        y: torch.Tensor = _PackedLinear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


def unpacked(weight_OI: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the values with which torchao's product multiplies: exact in float32, rounded once in another type.

    Args:
        weight_OI: [O, I], a tensor of torchao.
        dtype: Type of the result.
    """
    if not _is_scaled_by_row(weight_OI):
        values: torch.Tensor = weight_OI.dequantize().to(dtype)
        return values
    return weight_OI.qdata.to(dtype).mul_(_row_scales(weight_OI, dtype))


def _is_scaled_by_row(weight_OI: Any) -> bool:
    """Return whether torchao multiplies with the whole numbers, and scales the product. It unpacks all other kinds."""
    return type(weight_OI).__name__ == "Int8Tensor" and weight_OI.block_size[-1] == weight_OI.shape[-1]


def _row_scales(weight_OI: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the scales, [O, 1], rounded to the weight's type as torchao does before it scales."""
    scales: torch.Tensor = weight_OI.scale.to(weight_OI.dtype).to(dtype)
    return scales


def _input_gradient(grad_y: torch.Tensor, weight_OI: Any) -> torch.Tensor:
    """Return the gradient to x by the operations of torchao's own backward pass, thus with the same bits."""
    if not _is_scaled_by_row(weight_OI):
        return grad_y @ unpacked(weight_OI, grad_y.dtype)
    return (grad_y * _row_scales(weight_OI, grad_y.dtype).T) @ weight_OI.qdata.to(grad_y.dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        # Not `save_for_backward`, whose tensors are counted and offloaded as activations; this one is a frozen weight.
        ctx.weight_OI = weight_OI
        return F.linear(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x = _input_gradient(grad_y, ctx.weight_OI) if ctx.needs_input_grad[0] else None
        return grad_x, None, None
