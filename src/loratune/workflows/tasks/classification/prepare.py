"""What a classifier needs before anything else is known of it: its data, since that has the classes, and its head."""

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
from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError
from loratune.run.progress import Progress
from loratune.workflows.tasks.classification.data import prepare_classified

if TYPE_CHECKING:
    pass


def classifier_positions(recipe: Recipe, config: Any) -> int | None:
    """The most tokens of a text that a classifier can read; its targets are resolved on the way, since the data comes later.

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
            f"model.task is {recipe.model.task}, but the weights of {recipe.model.name} come quantised ({method})",
            fix="name the model as it was before quantisation",
        )
    model = skeleton(config, trust_remote_code=recipe.model.trust_remote_code, classifier=True)
    resolve_targets(model, recipe.lora.targets, recipe.lora.layers)
    return usable_positions(model, positions_of(config))


def prepare_classifier(recipe: Recipe, base: BaseModel, config: Any, max_length: int, progress: Progress) -> TaskModel:
    """Read the labelled data, and see what head the base gets.

    Args:
        recipe: Whose task is classification.
        base: Where the base model lies.
        config: Of the base.
        max_length: The longest example, in tokens.
        progress: Who is told how it goes.

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
