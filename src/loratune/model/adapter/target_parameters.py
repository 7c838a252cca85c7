"""Adapters on parameters that are not the weight of a linear module: `lora.target_parameters`.

Mixtures of experts keep the weights of all experts of a layer in one tensor of three dimensions. PEFT gives each expert
its own matrices A and B and adds their product to the tensor while the module runs (`ParamWrapper`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.model.adapter.targets import Matrix, in_chosen_layers
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.recipe.recipe import LoraSection


def resolve_target_parameters(model: nn.Module, lora: LoraSection, targets: Sequence[str] = ()) -> tuple[Matrix, ...]:
    """Find the adapted parameters; return them as matrices with a `count`, ordered by full name.

    Args:
        model: The base model, without an adapter. It may be on the meta device.
        lora: The recipe's section, with `target_parameters` and `layers`.
        targets: Full names of the adapted modules.

    Raises:
        RecipeError: A name matches nothing, or a parameter that PEFT cannot adapt this way.
    """
    if not lora.target_parameters:
        return ()
    parameters = dict(model.named_parameters())
    found: dict[str, None] = {}
    for asked in lora.target_parameters:
        names = [name for name in parameters if name == asked or name.endswith(f".{asked}")]
        if not names:
            raise RecipeError(f"lora.target_parameters: {asked} matches no parameter", fix=_known(model))
        found |= dict.fromkeys(names)
    chosen = tuple(found) if lora.layers == "all" else in_chosen_layers(model, tuple(found), lora.layers)
    return tuple(_stack(name, model, targets) for name in sorted(chosen))


def _stack(name: str, model: nn.Module, targets: Sequence[str]) -> Matrix:
    module_name, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    shape = tuple(getattr(module, leaf).shape)
    if isinstance(module, nn.Linear | nn.Embedding | Conv1D) or module_name in targets:
        raise RecipeError(
            f"lora.target_parameters: {name} is the weight of a {type(module).__name__}",
            fix=f"lora.targets=[{module_name}]",
        )
    if len(shape) == 2:
        return Matrix(name=name, d_in=shape[1], d_out=shape[0])
    if len(shape) != 3:
        raise RecipeError(
            f"lora.target_parameters: {name} has {len(shape)} dimensions; PEFT adapts those of 2 and 3",
            fix=_known(model),
        )
    count, d_out, d_in = shape
    if getattr(module, "is_transposed", False):
        d_in, d_out = d_out, d_in
    return Matrix(name=name, d_in=d_in, d_out=d_out, count=count)


def _known(model: nn.Module) -> str:
    known = sorted({".".join(name.split(".")[-3:]) for name, tensor in model.named_parameters() if tensor.ndim == 3})
    return (
        f"known here: {', '.join(known)}"
        if known
        else "this model has no experts in one tensor; name matrices in lora.targets"
    )


def target_parameter_arguments(found: Sequence[Matrix], lora: LoraSection) -> dict[str, Any]:
    """Return the argument of PEFT's `LoraConfig`: the names as given, or the full names in the chosen layers."""
    if not found:
        return {}
    return {
        "target_parameters": list(lora.target_parameters) if lora.layers == "all" else [item.name for item in found]
    }


def target_parameters_in_words(found: Sequence[Matrix]) -> str:
    """Describe what is adapted: `experts.gate_up_proj of 64 experts in 2 layers`."""
    layers: dict[tuple[str, int], int] = {}
    for item in found:
        key = (".".join(item.name.split(".")[-2:]), item.count)
        layers[key] = layers.get(key, 0) + 1
    return ", ".join(f"{leaf} of {count} experts in {number} layers" for (leaf, count), number in layers.items())
