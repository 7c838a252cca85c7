"""The frozen base in 8-bit floats."""

from __future__ import annotations

import torch
from peft import PeftModel

from loratune.model.kernels.fp8_linear import MULTIPLE, Fp8Linear
from loratune.run.errors import RecipeError


def quantize_frozen_layers(model: PeftModel) -> int:
    """Let the frozen linear layers of the decoder compute in fp8; returns how many do.

    The output head, embeddings, norms and adapters stay as they are, and so do layers whose sides are no multiples of
    16.

    Args:
        model: The adapted model, in bfloat16.

    Raises:
        RecipeError: No layer can.
    """
    frozen = [
        (parent, name, layer)
        for parent in model.get_base_model().base_model.modules()
        for name, layer in parent.named_children()
        if type(layer) is torch.nn.Linear and _can(layer)
    ]
    if not frozen:
        raise RecipeError(
            "model.quantization is fp8, but the model has no frozen bfloat16 linear layers of whole sixteens",
            fix="model.quantization=none",
        )
    for parent, name, layer in frozen:
        setattr(parent, name, Fp8Linear(layer))
    return len(frozen)


def _can(layer: torch.nn.Linear) -> bool:
    whole = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
    return whole and layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad
