"""The trained model of a run, in memory: its base with its adapter, and its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loratune.model.adapter.attach import load_adapter
from loratune.model.device import device_here, torch_dtype
from loratune.model.load import BaseModel, download_weights, load_model, load_tokenizer, locate_model
from loratune.recipe.recipe import ModelSection, Recipe
from loratune.recipe.tasks import load_task
from loratune.run.directory import RunDir, read_json
from loratune.workflows.locked_recipe import located

if TYPE_CHECKING:
    from loratune.run.progress import Progress


def load_model_of(run: RunDir, progress: Progress) -> Any:
    """Return the run's base with its adapter, ready to answer, on the device of this machine.

    Raises:
        RecipeError: The run has no adapter yet, or its base is gone.
        MachineError: The base model is not on this machine and the Hub cannot be reached.
    """
    recipe = _recipe(run)
    device = device_here(recipe.train.device)
    base = locate_model(recipe.model, progress)
    if not load_task(recipe.model.task).writes_text:
        return _load_classifier(run, base, recipe.model).to(device).eval()
    model = load_model(base, recipe.model, dtype=torch_dtype(recipe.model.dtype), device=device)
    return load_adapter(model, run.adapter).eval()


def load_tokenizer_of(run: RunDir, progress: Progress) -> Any:
    """Return the tokenizer that the run was trained with, with its chat template and its new tokens.

    Raises:
        RecipeError: The run has no adapter yet.
    """
    recipe = _recipe(run)
    if not load_task(recipe.model.task).writes_text:
        return AutoTokenizer.from_pretrained(run.adapter)
    base = locate_model(recipe.model, progress)
    return load_tokenizer(replace(base, path=run.adapter), ModelSection(name=str(run.adapter)))


def _load_classifier(run: RunDir, base: BaseModel, section: ModelSection) -> Any:
    """Load the base with the run's classes, its head and its adapter."""
    names = dict(enumerate(read_json(run.lock)["inputs"]["labels"]))
    classifier = AutoModelForSequenceClassification.from_pretrained(
        download_weights(base),
        id2label=names,
        label2id={name: number for number, name in names.items()},
        pad_token_id=AutoTokenizer.from_pretrained(run.adapter).pad_token_id,
        trust_remote_code=section.trust_remote_code,
        ignore_mismatched_sizes=True,  # a head with another number of classes: the adapter brings the trained one
    )
    return load_adapter(classifier, run.adapter)


def _recipe(run: RunDir) -> Recipe:
    run.require_adapter()
    return Recipe.parse(located(read_json(run.lock)), file=run.lock)
