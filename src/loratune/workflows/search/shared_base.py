"""One loaded base model for several runs, one after the other: each gets modules of its own on the same weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from loratune.model.adapter.variants import changes_base
from loratune.model.device import free_memory
from loratune.workflows.load import load_base

if TYPE_CHECKING:
    from loratune.planning.preparation import Preparation
    from loratune.run.progress import Progress
    from loratune.training.held_out_loss import Nll


class SharedBase:
    """Loads the base model once, and hands out models that share its weights.

    What attaches an adapter to a model replaces its modules, their classes and their calls, and none of it can be
    taken back for certain. So every run gets new modules, and only the memory of the frozen weights is the same. A run
    that changes or packs these weights gets a model of its own.

    Attributes:
        losses: The base's held-out losses that the runs measured, as `Leg.base_losses`.
    """

    def __init__(self) -> None:
        self.losses: dict[str, Nll] = {}
        self._base: Any = None

    def __call__(self, prepared: Preparation, progress: Progress) -> Any:
        """Return the base model for a run, without an adapter."""
        recipe = prepared.recipe
        if changes_base(recipe.lora) or recipe.model.quantization != "none":
            self.release()  # there may be no room for two
            return load_base(prepared, progress)
        if self._base is None:
            self._base = load_base(prepared, progress)
        base = self._base
        if getattr(base, "is_quantized", False):
            self._base = None
            return base
        return with_shared_weights(base)

    def release(self) -> None:
        """Forget the loaded model; the next run loads it again."""
        self._base = None
        free_memory()


def with_shared_weights(model: torch.nn.Module) -> Any:
    """Return a copy of a model whose parameters are new objects on the same memory; tied ones stay tied."""
    memo: dict[int, Any] = {
        id(parameter): torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)
