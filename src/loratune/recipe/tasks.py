"""What a recipe cannot ask for with `task: sequence_classification`: settings of conversations, answers and their fast ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loratune.recipe.checks import Contradiction
from loratune.run.errors import RecipeError

CAUSAL_LM, CLASSIFICATION = "causal_lm", "sequence_classification"

LABELLED_COLUMNS = ("text", "sentence1", "sentence2", "label")
"""The columns of labelled texts, of those that `data.columns` knows."""

_WORKS = {
    "model": {"name", "revision", "dtype", "trust_remote_code", "task"},
    "data": {"train", "eval", "columns", "max_length", "on_long", "on_bad_row", "streaming"},
    "lora": {"r", "alpha", "dropout", "targets", "layers", "variant"},
    "train": {
        *("output_dir", "epochs", "learning_rate", "batch_size", "optimizer", "lora_plus_ratio", "schedule", "warmup_fraction"),
        *("weight_decay", "max_grad_norm", "seed", "engine", "device", "token_budget", "compile", "recompute"),
        *("eval_every", "save_every", "log_every", "keep_checkpoints", "final_adapter", "on_bad_step", "max_skipped_steps"),
        *("report_to", "strategy"),
    },
}  # fmt: skip
"""Settings that classification follows. Any other stays at its default, also one that is new."""

_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("data.streaming", (True,), "the names of the labels are found by reading all rows"),
    ("train.compile", (True,), "its layers run uncompiled"),
    ("lora.variant", ("pissa", "olora"), "its adapter is saved with the head beside it, for the base as it is"),
    ("lora.variant", ("eva", "loftq"), "what its adapter begins with is made for models that write text"),
    ("train.optimizer", ("muon",), "its head has vectors, and muon is for matrices"),
    ("train.strategy", ("fsdp",), "it trains in one process"),
)
"""Setting → values that are refused, and why."""


def is_classification(recipe: Any) -> bool:
    """Whether a recipe's model names the class of a text, in place of writing one."""
    return bool(recipe.model.task == CLASSIFICATION)


def check_task(recipe: Any) -> None:
    """Refuse settings that do not belong to the recipe's task.

    Raises:
        Contradiction: Naming the setting, its value, and what to do.
    """
    for problem, fix in _problems(recipe):
        raise Contradiction(problem, fix=fix)


def _problems(recipe: Any) -> Iterator[tuple[str, str]]:
    """What is wrong, and what to do."""
    columns = recipe.data.columns
    if not is_classification(recipe):
        for column in columns:
            if column in LABELLED_COLUMNS and column != "text":
                yield f"data.columns names {column}, which is for model.task {CLASSIFICATION}", f"task={CLASSIFICATION}"
        return
    for section in type(recipe).model_fields:
        part = getattr(recipe, section)
        for field, declared in type(part).model_fields.items():
            value, plain = getattr(part, field), declared.get_default(call_default_factory=True)
            if field not in _WORKS.get(section, ()) and value != plain:
                shown = list(value) if isinstance(value, tuple) else value
                yield (
                    f"{section}.{field} is {shown}, which model.task {CLASSIFICATION} does not have",
                    f"leave {section}.{field} out" if plain in (None, (), {}) else f"{section}.{field}={plain}",
                )
    for name, values, why in _REFUSED:
        value = _value(recipe, name)
        if value in values:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield f"{name} is {shown}, which model.task {CLASSIFICATION} does not have: {why}", f"leave {name} out"
    for column in columns:
        if column not in LABELLED_COLUMNS:
            yield (
                f"data.columns names {column}, but labelled rows have {', '.join(LABELLED_COLUMNS)}",
                "data.columns={text: …, label: …}",
            )


def _value(recipe: Any, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(recipe, section), field)


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
