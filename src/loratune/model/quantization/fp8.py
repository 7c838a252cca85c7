"""Quantization of the frozen base to 8-bit floats: `model.quantization: fp8`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loratune.model.kernels.fp8_linear import MULTIPLE, Fp8Linear
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from peft import PeftModel


def quantize_frozen_layers(model: PeftModel) -> int:
    """Replace the frozen linear layers of the decoder by fp8 layers; return how many were replaced.

    The output head, embeddings, norms and adapters stay as they are, and so do layers whose sides are not multiples of
    16.

    Args:
        model: The adapted model, in bfloat16.

    Raises:
        RecipeError: No layer can be replaced.
    """
    frozen = [
        (parent, name, layer)
        for parent in model.get_base_model().base_model.modules()
        for name, layer in parent.named_children()
        if type(layer) is torch.nn.Linear and _can_use_fp8(layer)
    ]
    if not frozen:
        raise RecipeError(
            "model.quantization is fp8, but the model has no frozen bfloat16 linear layers with sides that are "
            "multiples of 16",
            fix="model.quantization=none",
        )
    for parent, name, layer in frozen:
        setattr(parent, name, Fp8Linear(layer))
    return len(frozen)


def _can_use_fp8(layer: torch.nn.Linear) -> bool:
    fits = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
    return fits and layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad
