"""Compilation and gradient checkpointing of the repeated decoder layers, in training mode only.

The call of each layer object is replaced, because both must happen outside the layer's own `forward`, and not in
evaluation and generation, where compiling once more would cost more than it gains.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from loratune.model.kernels.dropout import current_rows, rows_of_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel


def prepare_layers(model: PeftModel, *, compiled: bool, num_recomputed: int) -> None:
    """Set how the decoder layers run in training mode; evaluation and generation are unchanged.

    Args:
        model: The adapted model.
        compiled: Whether to compile the layers, as one graph for all of them and any number of tokens.
        num_recomputed: Number of layers, from the first on, with gradient checkpointing: they keep only their input and
            run again in the backward pass.
    """
    for i, layer in enumerate(decoder_layers(model)):
        call = layer._call_impl
        if compiled and i > 0:  # the first needs no gradient to its input, and would need a second graph
            call = torch.compile(call, dynamic=True)
        layer._compiled_call_impl = _in_training(layer, call, recompute=i < num_recomputed)


def decoder_layers(model: PeftModel) -> list[torch.nn.Module]:
    """Return the layers that the decoder repeats: its longest list of modules."""
    decoder: Any = model.get_base_model().base_model
    lists = [list(module) for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


def _in_training(layer: torch.nn.Module, call: Callable[..., Any], *, recompute: bool) -> Callable[..., Any]:
    original: Callable[..., Any] = layer._call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return original(*args, **kwargs)
        if recompute:
            rows = current_rows()  # by the backward pass, another example may have had its forward
            return checkpoint(
                call, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), rows_of_forward(rows)), **kwargs
            )
        return call(*args, **kwargs)

    return run
