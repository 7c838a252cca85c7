"""Which models allow several examples in one forward, as far as a comparison on short examples cannot show it.

`loss.make_loss` compares packed examples with separate ones, on 24 tokens of each and up to the rounding of the
weights' type. A state that leaks into the next example may hide below that rounding, and a window of 4,096 tokens only
shows on longer examples. Both can be read from the model's structure, and are here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from collections.abc import Collection

_STATES = ("linear_attention", "conv", "mamba", "hybrid")
"""Layer types that pass a state from token to token, by the names of transformers' `ALLOWED_LAYER_TYPES`."""


def decoder_of(causal_lm: Any) -> Any:
    """Return the module that computes the hidden states for the output head."""
    decoder = causal_lm.base_model
    if decoder is causal_lm:  # Llama 4's text model, whose `base_model_prefix` names no module of it
        decoder = next(child for child in causal_lm.children() if isinstance(child, PreTrainedModel))
    return decoder


def obstacle(causal_lm: PreTrainedModel) -> str:
    """Return why examples must go through this model one at a time; an empty string if its structure allows packing.

    Args:
        causal_lm: The base model, with or without adapters in it.
    """
    decoder = decoder_of(causal_lm)
    stateful = _stateful(decoder)
    if stateful:
        return f"the state of {stateful} would leak into the next example"
    fixed = [
        type(module).__name__
        for module in decoder.modules()
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation()
    ]
    if fixed:
        return f"{fixed[0]} has an attention of its own that cannot be replaced"
    if getattr(decoder.config, "attn_temperature_tuning", False):
        return (
            "its attention depends on a token's position in the forward, not in its example (attn_temperature_tuning)"
        )
    return ""


def refuses_boundaries(error: TypeError) -> bool:
    """Tell whether a model's own code does not accept the boundaries of packed examples as arguments.

    Args:
        error: What the model's forward raised with them.
    """
    return bool(re.search(r"unexpected keyword argument '(cu_seq_lens|max_length)_[qk]'", str(error)))


def longest_packed(config: Any, windows: Collection[int]) -> tuple[int | None, str]:
    """Return the tokens of the longest example with which micro-batches may be packed, and why no longer one.

    Args:
        config: The model's configuration.
        windows: Attention windows in tokens that only a mask enforces, from `observe_attention`.

    Returns:
        None and an empty string if there is no limit.
    """
    limits = [
        (length, f"rotary positions of type {kind} depend on the longest example of a forward beyond {length:,} tokens")
        for kind, length in _changing_rotations(config.get_text_config())
    ]
    limits += [(window, f"only a mask limits its attention to {window:,} tokens") for window in windows]
    return min(limits, default=(None, ""))


def _stateful(decoder: torch.nn.Module) -> str:
    """Return the first module with a convolution or recurrence over tokens, by class or layer type; "" for none."""
    for module in decoder.modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        # "A_log": the state matrix of Mamba and gated delta nets, which share no base class
        if "A_log" in own or any(isinstance(child, torch.nn.Conv1d) for child in module.children()):
            return type(module).__name__
    kinds = getattr(decoder.config, "layer_types", None) or ()
    return next((f"layers of type {kind}" for kind in kinds if kind in _STATES), "")


def _changing_rotations(config: Any) -> list[tuple[str, int]]:
    """Return types of rotary positions whose frequencies depend on the forward's length, with the length from which."""
    settings: Any = getattr(config, "rope_parameters", None) or {}
    each = [settings] if "rope_type" in settings else [value for value in settings.values() if isinstance(value, dict)]
    return [
        (str(one["rope_type"]), int(one.get("original_max_position_embeddings") or config.max_position_embeddings))
        for one in each
        if one.get("rope_type") in ("longrope", "dynamic")
    ]
