"""Check that each pattern of a recipe applies to a module of the model; what patterns mean is in `patterns`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.model.adapter.patterns import pattern_of
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratune.recipe.recipe import LoraSection


def check_patterns(lora: LoraSection, names: Sequence[str]) -> None:
    """Check that each rank and alpha pattern applies to some module.

    Args:
        lora: The recipe's section.
        names: Full names of the adapted modules.

    Raises:
        RecipeError: A pattern matches no adapted module, or an earlier pattern applies to all that it matches.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        check_used(f"lora.{field}", getattr(lora, field), names, "adapted")


def check_used(field: str, patterns: Mapping[str, float], names: Sequence[str], what: str) -> None:
    """Check that each pattern of one field applies to some module.

    Args:
        field: The recipe's field, for messages.
        patterns: Pattern → value.
        names: Full names of the modules.
        what: What the modules are, in a message: `adapted`, `trained`.

    Raises:
        RecipeError: A pattern matches no module, or an earlier pattern applies to all that it matches.
    """
    used = {pattern_of(patterns, name) for name in names}
    unused = next((pattern for pattern in patterns if pattern not in used), None)
    if unused is None:
        return
    problem = f"{field}: {unused} applies to none of the {what} modules"
    matching = [name for name in names if pattern_of({unused: 1}, name) == unused]
    if matching:
        before = pattern_of(patterns, matching[0])
        raise RecipeError(
            f"{problem}: {before}, which comes before it, matches them all", fix=f"write {unused} before {before}"
        )
    known = sorted({name.rpartition(".")[2] for name in names})
    raise RecipeError(
        problem,
        fix=f"{what} are {', '.join(known)}; a pattern is a regular expression for a module's full name or its last "
        f"parts, such as {_example(names)}",
    )


def _example(names: Sequence[str]) -> str:
    return ".".join(names[0].split(".")[-2:])
