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


def check_quantization(recipe: Any) -> None:
    """What goes with the kind of `model.quantization`.

    Args:
        recipe: A `Recipe`, whose module needs this one.

    Raises:
        ValueError: Two settings that do not go together.
    """
    chosen, dtype, train = recipe.model.quantization, recipe.model.dtype, recipe.train
    if chosen == "fp8" and dtype not in ("auto", "bfloat16"):
        raise ValueError(f"model.quantization is fp8, which is made from bfloat16, but model.dtype is {dtype}")
    if chosen not in ("none", "fp8"):
        if dtype == "float16":
            raise ValueError(f"model.quantization is {chosen}, whose products are in bfloat16 or float32, not float16")
        if train.compile is True:
            raise ValueError(f"train.compile is true, but the layers of {chosen} run uncompiled")
        if chosen == "int8" and train.recompute not in ("auto", 0):
            raise ValueError(
                "train.recompute is not 0, but int8 layers of bitsandbytes keep their inputs where recomputing cannot free them"
            )
    if chosen != "none" and recipe.lora.variant in ("dora", "pissa", "olora"):
        raise ValueError(
            f"lora.variant is {recipe.lora.variant}, which needs the weights as they are, but model.quantization is {chosen}"
        )


def check_muon(recipe: Any) -> None:
    """Muon makes steps of matrices orthogonal, and is for nothing else.

    Args:
        recipe: A `Recipe`.

    Raises:
        ValueError: Something else would be trained.
    """
    if recipe.train.optimizer != "muon":
        return
    if recipe.lora.variant == "dora":
        raise ValueError(
            "train.optimizer is muon, which is for matrices, but lora.variant is dora, whose magnitudes are vectors"
        )
    for name in ("modules_to_save", "new_tokens", "target_parameters"):
        if getattr(recipe.lora, name):
            raise ValueError(f"train.optimizer is muon, which is for the adapter's matrices, but lora.{name} is given")


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
