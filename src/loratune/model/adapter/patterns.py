"""Ranks, scales and learning rates of single modules, by patterns with PEFT's meaning.

These are `lora.rank_pattern`, `lora.alpha_pattern` and `train.learning_rate_pattern`. A pattern is a regular expression
that matches a module's full name or its last dotted parts; the first that matches applies
(`peft.utils.other.get_pattern_key`).
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft.utils.other import get_pattern_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loratune.recipe.recipe import LoraSection


def rank_of(lora: LoraSection, name: str) -> int:
    """Return the rank of the matrix with this full name."""
    return lora.rank_pattern.get(pattern_of(lora.rank_pattern, name), lora.r)


def alpha_of(lora: LoraSection, name: str) -> float:
    """Return the alpha of the matrix with this full name."""
    return lora.alpha_pattern.get(pattern_of(lora.alpha_pattern, name), lora.alpha)


def highest_rank(lora: LoraSection) -> int:
    """Return the largest rank in the recipe."""
    return max(lora.r, *lora.rank_pattern.values()) if lora.rank_pattern else lora.r


def module_of(parameter: str) -> str:
    """Return the full name, in the base model, of the module of a trained parameter."""
    name = parameter.removeprefix("base_model.model.").replace(".base_layer", "")
    for inside in (".lora_", ".modules_to_save.", ".token_adapter."):
        name = name.partition(inside)[0]
    return name


def matching_only(lora: LoraSection, names: Sequence[str]) -> LoraSection:
    """Return the section without patterns that match none of these modules, of which PEFT would warn."""
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
    """Silence PEFT's warning of patterns that match no module, after `check_patterns` has checked them."""
    # PEFT warns although a pattern may apply to `target_parameters`, which it does not look at.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def pattern_of(patterns: Mapping[str, float], name: str) -> str:
    """Return the pattern that applies to the module with this full name; the name itself if none does."""
    return str(get_pattern_key(list(patterns), name))
