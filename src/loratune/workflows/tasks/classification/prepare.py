"""Resolve a classifier's model: the classes are in the data, so the data is read first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.model.adapter.targets import resolve_targets
from loratune.model.classifier import (
    Classes,
    classifier_notes,
    head_names,
    set_padding,
    stored_names,
    usable_positions,
    with_classes,
)
from loratune.model.load import BaseModel, load_tokenizer, positions_of
from loratune.model.quantization.checkpoint import method_of
from loratune.planning.parameters import skeleton
from loratune.planning.task import TaskModel
from loratune.run.errors import RecipeError
from loratune.workflows.tasks.classification.data import prepare_classified

if TYPE_CHECKING:
    from loratune.recipe.recipe import Recipe
    from loratune.run.progress import Progress


def classifier_positions(recipe: Recipe, config: Any) -> int | None:
    """Return the most tokens of a text, and check the adapter's targets before any data is read.

    Raises:
        RecipeError: There is no classifier of this architecture, or the targets do not fit it.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise RecipeError(
            f"model.task is {recipe.model.task}, but {config.model_type} is an encoder with a decoder",
            fix="choose an encoder such as BERT or RoBERTa, or a decoder such as Llama or Qwen2",
        )
    method = method_of(config)
    if method is not None:
        raise RecipeError(
            f"model.task is {recipe.model.task}, but the weights of {recipe.model.name} are quantized ({method})",
            fix="use the unquantized model",
        )
    model = skeleton(config, trust_remote_code=recipe.model.trust_remote_code, classifier=True)
    resolve_targets(model, recipe.lora.targets, recipe.lora.layers)
    return usable_positions(model, positions_of(config))


def prepare_classifier(recipe: Recipe, base: BaseModel, config: Any, max_length: int, progress: Progress) -> TaskModel:
    """Read the labeled data, and find out what head the base gets.

    Args:
        recipe: The recipe of a classifier.
        base: The base model.
        config: The base model's configuration.
        max_length: The most tokens of an example.
        progress: Shows how far it is.

    Raises:
        RecipeError: The tokenizer cannot pad.
        DataError, MachineError: As `prepare_classified`.
    """
    section, seed = recipe.model, recipe.train.seed
    tokenizer = load_tokenizer(base, section)
    pad_token_id = set_padding(tokenizer, name=base.name)
    data = prepare_classified(recipe.data, tokenizer, max_length=max_length, seed=seed, progress=progress)
    names = tuple(data.report["labels"])
    config = with_classes(config, names, pad_token_id)
    model = skeleton(config, trust_remote_code=section.trust_remote_code, classifier=True)
    stored = base.tensors or stored_names(base.path)
    classes = Classes(names=names, pad_token_id=pad_token_id, head=head_names(model, stored), seed=seed)
    return TaskModel(
        config=config,
        tokenizer=tokenizer,
        classes=classes,
        data=data,
        notes=classifier_notes(model, classes, stored),
    )
