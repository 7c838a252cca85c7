"""How the decoder layers, which a model repeats, run in training: compiled once for all, and keeping or recomputing.

The call of each layer object is replaced, because both must happen in training only and outside the layer's own `forward`:
compiling again for evaluation and generation would cost more than it gains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint


def prepare_layers(model: PeftModel, *, compiled: bool, num_recomputed: int) -> None:
    """Set how the decoder layers run in training; evaluation and generation run them as they are.

    Args:
        model: The adapted model.
        compiled: Whether the layers run compiled: one graph for all of them and any number of tokens. The first one does not:
            it gets no gradient to its input, and would need a graph of its own.
        num_recomputed: How many layers, from the first on, keep only their input and compute the rest again backwards.
    """
    for i, layer in enumerate(decoder_layers(model)):
        call = layer._call_impl
        if compiled and i > 0:
            call = torch.compile(call, dynamic=True)
        layer._compiled_call_impl = _in_training(layer, call, recompute=i < num_recomputed)


def decoder_layers(model: PeftModel) -> list[torch.nn.Module]:
    """The layers that the decoder repeats: its longest list of modules."""
    decoder: Any = model.get_base_model().base_model
    lists = [list(module) for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


def _in_training(layer: torch.nn.Module, call: Callable[..., Any], *, recompute: bool) -> Callable[..., Any]:
    as_it_is: Callable[..., Any] = layer._call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return as_it_is(*args, **kwargs)
        if recompute:
            return checkpoint(call, *args, use_reentrant=False, **kwargs)
        return call(*args, **kwargs)

    return run
