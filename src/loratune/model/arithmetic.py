"""Compute with a model in float32, whatever type its weights are stored in, without a float32 copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Maps a tensor's name in the model and its float32 values to the values to compute with, as a new tensor."""

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)

_Named = tuple[str, torch.Tensor]


@contextmanager
def float32_arithmetic(model: torch.nn.Module, change: Change | None = None) -> Iterator[None]:
    """Run forward passes of a model in float32 inside the block. Its tensors are the same before and after.

    The weights of a repeated layer are widened while it runs, so that memory grows by one layer and by what is outside
    of the layers (embedding and head). Packed weights stay as they are.

    Args:
        model: The model, in evaluation mode.
        change: Replaces values for the block; None computes with the values as stored.
    """
    layers = _layers(model)
    inside = {id(tensor) for layer in layers for _, tensor in _tensors(layer)}
    names = {id(tensor): name for name, tensor in _tensors(model)}
    widened: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def widen(layer: torch.nn.Module, _: object) -> None:
        own = [(names[id(tensor)], tensor) for _, tensor in _tensors(layer)]
        widened[layer] = _widen(own, change)

    def restore(layer: torch.nn.Module, *_: object) -> None:
        _restore(widened.pop(layer, []))

    hooks = [layer.register_forward_pre_hook(widen) for layer in layers]
    hooks += [layer.register_forward_hook(restore, always_call=True) for layer in layers]
    outside = _widen([(name, tensor) for name, tensor in _tensors(model) if id(tensor) not in inside], change)
    try:
        yield
    finally:
        _restore(outside)
        for layer in layers:
            restore(layer)
        for hook in hooks:
            hook.remove()


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of all outermost lists of modules."""
    if isinstance(model, torch.nn.ModuleList):
        return list(model)
    return [layer for child in model.children() for layer in _layers(child)]


def _tensors(module: torch.nn.Module) -> list[_Named]:
    return [*module.named_parameters(), *module.named_buffers()]


def _widen(tensors: Sequence[_Named], change: Change | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Replace the values of tensors; return each tensor with its former values."""
    former = []
    for name, tensor in tensors:
        stored = tensor.data
        if stored.dtype not in _PLAIN or type(stored) is not torch.Tensor:  # packed by bitsandbytes or torchao
            continue
        values = stored.float() if change is None else change(name, stored.float())
        if values is not stored:
            former.append((tensor, stored))
            tensor.data = values
    return former


def _restore(former: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, stored in former:
        tensor.data = stored
