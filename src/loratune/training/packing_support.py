"""Which models may have several examples in one forward, where a comparison on short examples cannot see it.

`loss.make_loss` compares packed examples with separate ones, on 24 tokens of each and to the rounding of the weights' type.
A state that runs on into the next example may hide below that rounding, and a window of 4,096 tokens shows on longer
examples only. Both stand in the model's structure.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

_STATES = ("linear_attention", "conv", "mamba", "hybrid")
"""What configurations call layers that hand a state from token to token; see transformers' `ALLOWED_LAYER_TYPES`."""


def decoder_of(causal_lm: Any) -> Any:
    """What makes the hidden states that the head takes.

    Llama 4's text model does not have its decoder where its own `base_model_prefix` says, and is its own base model then.
    """
    decoder = causal_lm.base_model
    if decoder is causal_lm:
        decoder = next(child for child in causal_lm.children() if isinstance(child, PreTrainedModel))
    return decoder


def obstacle(causal_lm: PreTrainedModel) -> str:
    """Why the examples must go through this model one at a time; empty where nothing in its structure says so.

    Args:
        causal_lm: The base model, with or without adapters in it.
    """
    decoder = decoder_of(causal_lm)
    stateful = _stateful(decoder)
    if stateful:
        return f"the state of {stateful} would run on into the next example"
    fixed = [
        type(module).__name__
        for module in decoder.modules()
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation()
    ]
    if fixed:
        return f"the attention of {fixed[0]} is its own and cannot be exchanged"
    if getattr(decoder.config, "attn_temperature_tuning", False):
        return "its attention depends on a token's place in the forward, not in its example (attn_temperature_tuning)"
    return ""


def longest_packed(config: Any, untold: Collection[int]) -> tuple[int | None, str]:
    """The longest example, in tokens, up to which micro-batches may be packed, and why not beyond; None without a limit.

    Args:
        config: The model's.
        untold: Windows that only a mask keeps to, from `record_untold_windows`.
    """
    limits = [
        (length, f"rotary positions of type {kind} depend on the longest example of a forward beyond {length:,} tokens")
        for kind, length in _changing_rotations(config.get_text_config())
    ]
    limits += [(window, f"a mask alone keeps its attention to {window:,} tokens") for window in untold]
    return min(limits, default=(None, ""))


def _stateful(decoder: torch.nn.Module) -> str:
    """The class of the first module with a convolution or a recurrence over tokens, or the kind of its layer."""
    for module in decoder.modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if "A_log" in own or any(isinstance(child, torch.nn.Conv1d) for child in module.children()):
            return type(module).__name__
    kinds = getattr(decoder.config, "layer_types", None) or ()
    return next((f"layers of type {kind}" for kind in kinds if kind in _STATES), "")


def _changing_rotations(config: Any) -> list[tuple[str, int]]:
    """Types of rotary positions whose frequencies depend on the length of the forward, and up to where they do not."""
    settings: Any = getattr(config, "rope_parameters", None) or {}
    each = [settings] if "rope_type" in settings else [value for value in settings.values() if isinstance(value, dict)]
    return [
        (str(one["rope_type"]), int(one.get("original_max_position_embeddings") or config.max_position_embeddings))
        for one in each
        if one.get("rope_type") in ("longrope", "dynamic")
    ]
