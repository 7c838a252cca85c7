"""A frozen linear layer in 8-bit floats: y = x·Wᵀ + b, and the gradient to x, as two scaled products.

The weight is quantized once, in the two layouts that the products need: rows of W with a scale per output, rows of Wᵀ
with a scale per input. Inputs and gradients are quantized in each step with a scale per token, so a token's result does
not depend on the other tokens of its micro-batch. All are e4m3, which has one bit of mantissa more than e5m2; its
smaller range (Micikevicius et al. 2022, "FP8 Formats for Deep Learning") does not matter when every row has its own
scale.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch

_E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(_E4M3).max

MULTIPLE = 16
"""The scaled product of NVIDIA's libraries requires inputs and outputs to be multiples of this."""


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to e4m3 with float32 scales: row ≈ quantized · scale.

    Args:
        x: [rows, columns].

    Returns:
        The quantized rows, [rows, columns], and their scales, [rows, 1].
    """
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).to(_E4M3), scale


class Fp8Linear(torch.nn.Module):
    """An fp8 replacement of a frozen `torch.nn.Linear` in bfloat16.

    Args:
        layer: The layer to replace; its weight is not kept.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight_OI = layer.weight.detach()
        self.rows_OI, self.rows_scale_O1 = (torch.nn.Buffer(part) for part in quantize_rows(weight_OI))
        self.columns_IO, self.columns_scale_I1 = (
            torch.nn.Buffer(part) for part in quantize_rows(weight_OI.T.contiguous())
        )
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., I] to [..., O] in the type of `x`, with a gradient to `x`."""
        y: torch.Tensor = _Fp8Linear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, self.in_features), self.rows_OI, self.rows_scale_O1, self.columns_IO, self.columns_scale_I1
        )
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        rows_OI: torch.Tensor,
        rows_scale_O1: torch.Tensor,
        columns_IO: torch.Tensor,
        columns_scale_I1: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(columns_IO, columns_scale_I1)
        return _scaled_product(x_TI, rows_OI, rows_scale_O1)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        columns_IO, columns_scale_I1 = ctx.saved_tensors
        return _scaled_product(grad_TO.contiguous(), columns_IO, columns_scale_I1), None, None, None, None


def _scaled_product(x: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply x, [T, K], by the transpose of `rows`, [N, K], whose rows have scales [N, 1]: [T, N] in bfloat16."""
    quantized, token_scale_T1 = quantize_rows(x)
    return torch._scaled_mm(quantized, rows.T, scale_a=token_scale_T1, scale_b=scale.T, out_dtype=torch.bfloat16)
