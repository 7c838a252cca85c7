"""What is wrong with settings that are right each by itself: checks of the recipe over several of them."""

from __future__ import annotations

import re
from typing import Any


def check_regular_expressions(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse keys that are none.

    Raises:
        ValueError: Which one, and why.
    """
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern} is no regular expression: {error}") from None
    return value


def check_once(field: str, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a list that names something twice.

    Raises:
        ValueError: What.
    """
    if len(set(value)) < len(value):
        raise ValueError(f"{field}: {max(value, key=value.count)} is named twice")
    return value


def check_beside(recipe: Any) -> None:
    """What is trained beside the adapter's matrices, against other settings.

    Args:
        recipe: A `Recipe`, whose module needs this one.

    Raises:
        ValueError: Two settings that do not go together.
    """
    lora = recipe.lora
    if lora.start_from is not None and lora.variant in ("pissa", "olora", "eva", "loftq"):
        raise ValueError(
            f"lora.variant is {lora.variant}, which decides how A and B begin, but lora.start_from names an adapter to begin with; "
            "adapters that it made are saved as plain"
        )
    if lora.variant == "eva" and lora.rank_pattern:
        raise ValueError(
            "lora.variant is eva, which gives matrices with one input one rank, but lora.rank_pattern gives ranks of their own; leave one "
            "of them out"
        )
    if lora.variant == "loftq" and recipe.model.quantization != "nf4":
        raise ValueError(
            "lora.variant is loftq, which begins with what nf4 took away from the weights, but model.quantization is "
            f"{recipe.model.quantization}; set model.quantization: nf4"
        )
    if lora.start_from is not None and lora.new_tokens:
        raise ValueError(
            "lora.new_tokens adds tokens, but lora.start_from names an adapter, whose tokenizer is another; leave one of them out"
        )
    if not lora.target_parameters:
        return
    if lora.dropout:
        raise ValueError(
            f"lora.target_parameters adapts a tensor as a whole, which has no input of its own to drop from, but lora.dropout is "
            f"{lora.dropout:g}; set lora.dropout: 0"
        )
    if lora.variant not in ("plain", "rslora"):
        raise ValueError(
            f"lora.target_parameters goes with lora.variant plain or rslora, but lora.variant is {lora.variant}"
        )
    if recipe.model.quantization != "none":
        raise ValueError(
            f"lora.target_parameters names tensors that are not packed, but model.quantization is {recipe.model.quantization}; set "
            "model.quantization: none"
        )
    if recipe.train.compile is True:
        raise ValueError(
            "train.compile is true, but PEFT changes the parameters of lora.target_parameters while a layer runs, so it runs "
            "uncompiled"
        )
