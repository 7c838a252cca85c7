"""Base, adapter, and the way to the loss: what everything that needs the weights begins with."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from loratune.model.adapter import attach_adapter, fallback_note, load_adapter
from loratune.model.beginning import begin_from
from loratune.model.device import torch_dtype
from loratune.model.fp8 import quantise_frozen
from loratune.model.load import load_model
from loratune.preparation import Preparation
from loratune.progress import Progress
from loratune.run import RunDir
from loratune.training.classifier_loss import ClassificationLoss, make_classification_loss
from loratune.training.compilation import prepare_layers
from loratune.training.loss import SupervisedLoss, make_loss


def load_base(prepared: Preparation, progress: Progress) -> Any:
    """The base model alone."""
    recipe = prepared.recipe
    progress.line(f"loading {recipe.model.name} in {recipe.model.dtype} on {recipe.train.device}")
    return load_model(
        prepared.base,
        recipe.model,
        dtype=torch_dtype(recipe.model.dtype),
        device=recipe.train.device,
        classes=prepared.classes,
    )


def adapt(prepared: Preparation, base: Any, progress: Progress) -> tuple[PeftModel, SupervisedLoss]:
    """The adapter on the base, fresh or that of `lora.start_from`, and the way to its loss, ready for training."""
    recipe = prepared.recipe
    model = attach_adapter(
        base,
        recipe.lora,
        prepared.targets,
        base_name=_loadable_name(prepared),
        seed=recipe.train.seed,
        classes=prepared.classes,
    )
    if prepared.start is not None:
        begin_from(model, prepared.start)
    if recipe.model.quantization == "fp8":
        quantise_frozen(model)
    loss, reason = _loss(prepared, model)
    if recipe.train.engine == "trl":
        return model, loss
    if reason:
        progress.warn(reason)
    note = fallback_note(model)
    if note and recipe.lora.variant != "dora":  # of which the plan speaks
        progress.warn(note)
    loss.compiled = recipe.train.compile is True
    prepare_layers(model, compiled=loss.compiled, num_recomputed=int(recipe.train.recompute))
    return model, loss


def load_trained(prepared: Preparation, run: RunDir, progress: Progress) -> tuple[PeftModel, SupervisedLoss]:
    """Base and the run's adapter."""
    model = load_adapter(load_base(prepared, progress), run.adapter)
    if prepared.recipe.model.quantization == "fp8":
        quantise_frozen(model)
    return model, _loss(prepared, model)[0]


def _loss(prepared: Preparation, model: PeftModel) -> tuple[SupervisedLoss, str]:
    """The way to the loss, and what to say where it is not the fastest of the engine."""
    kind = SupervisedLoss if prepared.classes is None else ClassificationLoss
    if prepared.recipe.train.engine == "trl":
        return kind(model, packed=False), ""
    if prepared.classes is not None:
        found, reason = make_classification_loss(model, prepared.data.train)
        return found, f"examples are padded: {reason}" if reason else ""
    loss, reason = make_loss(model, prepared.data.train)
    return loss, f"one example at a time: {reason}" if reason else ""


def _loadable_name(prepared: Preparation) -> str:
    """What PEFT can load the base by: its hub id, or its folder."""
    return prepared.base.name if prepared.base.revision else str(prepared.base.path)
