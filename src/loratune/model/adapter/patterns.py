"""Ranks and scales of single matrices: `lora.rank_pattern`, `lora.alpha_pattern` and `train.learning_rate_pattern`, read as PEFT reads
the first two.

A pattern is a regular expression that matches a module's full name, or its last dotted parts; of several that match, the first
counts (`peft.utils.other.get_pattern_key`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from peft.utils.other import get_pattern_key

from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError


def rank_of(lora: LoraSection, name: str) -> int:
    """The rank of the matrix of this full name."""
    return lora.rank_pattern.get(pattern_of(lora.rank_pattern, name), lora.r)


def alpha_of(lora: LoraSection, name: str) -> float:
    """Its alpha."""
    return lora.alpha_pattern.get(pattern_of(lora.alpha_pattern, name), lora.alpha)


def highest_rank(lora: LoraSection) -> int:
    """The largest rank that the recipe names."""
    return max(lora.r, *lora.rank_pattern.values()) if lora.rank_pattern else lora.r


def check_patterns(lora: LoraSection, names: Sequence[str]) -> None:
    """Whether each pattern decides about something.

    Args:
        lora: Of the recipe.
        names: Full names of the adapted modules.

    Raises:
        RecipeError: One matches no adapted module, or another one before it has all that it matches.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        check_used(f"lora.{field}", getattr(lora, field), names, "adapted")


def check_used(field: str, patterns: Mapping[str, float], names: Sequence[str], what: str) -> None:
    """Whether each of one field's patterns decides about something.

    Raises:
        RecipeError: As `check_patterns`.
    """
    used = {pattern_of(patterns, name) for name in names}
    unused = next((pattern for pattern in patterns if pattern not in used), None)
    if unused is None:
        return
    problem = f"{field}: {unused} decides about none of the {what} modules"
    matching = [name for name in names if pattern_of({unused: 1}, name) == unused]
    if matching:
        before = pattern_of(patterns, matching[0])
        raise RecipeError(
            f"{problem}: {before}, which stands before it, matches them all", fix=f"write {unused} before {before}"
        )
    known = sorted({name.rpartition(".")[2] for name in names})
    raise RecipeError(
        problem,
        fix=f"{what} are {', '.join(known)}; a pattern is a regular expression of a module's last parts or whole name, such as "
        f"{_example(names)}",
    )


def module_of(parameter: str) -> str:
    """The full name that the module of a trained parameter has in the base model."""
    name = parameter.removeprefix("base_model.model.").replace(".base_layer", "")
    for inside in (".lora_", ".modules_to_save.", ".token_adapter."):
        name = name.partition(inside)[0]
    return name


def matching_only(lora: LoraSection, names: Sequence[str]) -> LoraSection:
    """Without the patterns that match none of these modules, of which PEFT would warn."""
    changes = {
        field: {
            pattern: value
            for pattern, value in getattr(lora, field).items()
            if any(pattern_of({pattern: value}, name) == pattern for name in names)
        }
        for field in ("rank_pattern", "alpha_pattern")
    }
    return lora.model_copy(update=changes)


@contextmanager
def checked_patterns() -> Iterator[None]:
    """Without PEFT's warning of patterns that match no module: it does not look at `target_parameters`, which they decide about as well,
    and `check_patterns` does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def pattern_of(patterns: Mapping[str, float], name: str) -> str:
    """The pattern that decides about the module of this full name; the name itself where none does."""
    return str(get_pattern_key(list(patterns), name))


def _example(names: Sequence[str]) -> str:
    return ".".join(names[0].split(".")[-2:])
