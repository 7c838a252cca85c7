"""The adapter's matrices in the type of the frozen weights, cast once for all micro-batches of a step.

The optimizer updates float32 masters. Cast where they are used, they would be cast again in every layer of every
micro-batch: four launches of a GPU for a layer with an adapter on query and value.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def cast_once(model: torch.nn.Module) -> Iterator[None]:
    """Let the fast LoRA layers compute with copies made now; meanwhile, nothing may change the adapter.

    Args:
        model: A model whose layers `use_fast_layers` has seen.
    """
    layers: list[tuple[Any, tuple[torch.Tensor, ...]]] = []
    masters: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for layer in _layers_of_other_type(model):
        own = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        narrow = tuple(torch.empty_like(master, dtype=layer.base_layer.weight.dtype) for master in own)
        layers.append((layer, narrow))
        masters += own
        copies += narrow
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(copies, masters)
    try:
        for layer, narrow in layers:
            layer.narrow = narrow
        yield
    finally:
        for layer, _ in layers:
            layer.narrow = None


def _layers_of_other_type(model: torch.nn.Module) -> Iterator[Any]:
    """Yield the fast layers on plain linear ones whose masters have another type than the frozen weight."""
    for layer in model.modules():
        if not getattr(layer, "is_fast", False) or "default" not in getattr(layer, "lora_A", {}):
            continue
        base: Any = layer.base_layer
        if type(base) is torch.nn.Linear and base.weight.dtype != layer.lora_A["default"].weight.dtype:  # type: ignore[index,union-attr]
            yield layer
