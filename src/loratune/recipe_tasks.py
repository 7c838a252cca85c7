"""What a recipe cannot ask for with `task: sequence_classification`: settings of conversations, answers and their fast ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loratune.errors import RecipeError

CAUSAL_LM, CLASSIFICATION = "causal_lm", "sequence_classification"

LABELLED_COLUMNS = ("text", "sentence1", "sentence2", "label")
"""The columns of labelled texts, of those that `data.columns` knows."""

_OF_CONVERSATIONS = (
    "model.quantization", "data.format", "data.train_on", "data.thinking", "data.special_tokens_in_text",
    "lora.start_from", "evaluate.metric", "evaluate.samples", "evaluate.max_new_tokens", "evaluate.forgetting",
)  # fmt: skip
"""Settings that classification has no use for, or does not do yet: they stay at their defaults."""

_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("data.streaming", (True,), "the names of the labels are found by reading all rows"),
    ("train.compile", (True,), "its layers run uncompiled"),
    ("lora.variant", ("pissa", "olora"), "its adapter is saved with the head beside it, for the base as it is"),
)
"""Setting → values that are refused, and why."""


def is_classification(recipe: Any) -> bool:
    """Whether a recipe's model names the class of a text, in place of writing one."""
    return bool(recipe.model.task == CLASSIFICATION)


def check_task(recipe: Any) -> None:
    """Refuse settings that do not belong to the recipe's task.

    Raises:
        ValueError: Naming the setting, its value, and what to do.
    """
    problem = next(_problems(recipe), "")
    if problem:
        raise ValueError(problem)


def _problems(recipe: Any) -> Iterator[str]:
    columns = recipe.data.columns
    if not is_classification(recipe):
        for column in columns:
            if column in LABELLED_COLUMNS and column != "text":
                yield f"data.columns names {column}, which is for model.task {CLASSIFICATION}"
        return
    for name in _OF_CONVERSATIONS:
        value, plain = _value(recipe, name), _default(recipe, name)
        if value != plain:
            yield f"{name} is {value}, which model.task {CLASSIFICATION} does not have; leave it at {plain}"
    for name, values, why in _REFUSED:
        value = _value(recipe, name)
        if value in values:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield f"{name} is {shown}, which model.task {CLASSIFICATION} does not have: {why}"
    for column in columns:
        if column not in LABELLED_COLUMNS:
            yield f"data.columns names {column}, but labelled rows have {', '.join(LABELLED_COLUMNS)}"


def _value(recipe: Any, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(recipe, section), field)


def _default(recipe: Any, name: str) -> Any:
    section, _, field = name.partition(".")
    return type(getattr(recipe, section)).model_fields[field].get_default(call_default_factory=True)


def refuse_classifier(recipe: Any, what: str, fix: str = "") -> None:
    """Say that a verb is for models that write text.

    Args:
        recipe: Of the run, or of the run to be.
        what: The verb or option.
        fix: What to do in its place.

    Raises:
        RecipeError: The recipe's task is classification.
    """
    if is_classification(recipe):
        raise RecipeError(
            f"{what} is for models that write text, and model.task is {CLASSIFICATION}",
            fix=fix or "docs/classification.md has what works with it",
        )
