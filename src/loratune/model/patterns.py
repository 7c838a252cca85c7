"""Ranks and scales of single matrices: `lora.rank_pattern` and `lora.alpha_pattern`, read as PEFT reads them.

A pattern is a regular expression that matches a module's full name, or its last dotted parts; of several that match, the first
counts (`peft.utils.other.get_pattern_key`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft.utils.other import get_pattern_key

from loratune.errors import RecipeError
from loratune.recipe import LoraSection


def rank_of(lora: LoraSection, name: str) -> int:
    """The rank of the matrix of this full name."""
    return lora.rank_pattern.get(_key(lora.rank_pattern, name), lora.r)


def alpha_of(lora: LoraSection, name: str) -> float:
    """Its alpha."""
    return lora.alpha_pattern.get(_key(lora.alpha_pattern, name), lora.alpha)


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
        patterns: Mapping[str, float] = getattr(lora, field)
        used = {_key(patterns, name) for name in names}
        unused = [pattern for pattern in patterns if pattern not in used]
        if unused:
            raise RecipeError(
                f"lora.{field}: {unused[0]} decides about none of the adapted modules",
                fix=f"a regular expression of a module's last parts or whole name, such as {_example(names)}; of several that "
                "match, the first counts",
            )


def matching_only(lora: LoraSection, names: Sequence[str]) -> LoraSection:
    """Without the patterns that match none of these modules, of which PEFT would warn."""
    changes = {
        field: {
            pattern: value
            for pattern, value in getattr(lora, field).items()
            if any(_key({pattern: value}, name) == pattern for name in names)
        }
        for field in ("rank_pattern", "alpha_pattern")
    }
    return lora.model_copy(update=changes)


def _key(patterns: Mapping[str, float], name: str) -> str:
    return str(get_pattern_key(list(patterns), name))


def _example(names: Sequence[str]) -> str:
    return ".".join(names[0].split(".")[-2:])
