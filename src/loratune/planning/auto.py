"""planning.auto."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratune.model.device import Choice, choose_dtype
from loratune.planning.hardware.devices import Device
from loratune.planning.memory.memory import MemoryPlan, free_bytes
from loratune.planning.preparation import NO_LIMIT
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    pass


def _free_bytes(device: str) -> int | None:
    """Of the processes that share a machine's memory, the share of one; each has a GPU of its own."""
    return None if processes.local_size() == 1 or device != "cpu" else free_bytes(device) // processes.local_size()


def output_dir(recipe: Recipe) -> Path:
    """The run directory; `auto` is named after the model, as in the seed's script."""
    if recipe.train.output_dir != "auto":
        return Path(recipe.train.output_dir)
    name = recipe.model.name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return Path("__models") / f"{name}-lora-fine-tuned"


def _max_length(recipe: Recipe, positions: int | None) -> Choice:
    wanted = recipe.data.max_length
    if wanted == "auto":
        if positions is None:
            return Choice(str(NO_LIMIT), "the model's config states no limit")
        return Choice(str(positions), "the positions of the model")
    if positions is not None and int(wanted) > positions:
        if "max_length" not in recipe.data.model_fields_set:  # nobody asked for the default
            return Choice(str(positions), f"the positions of the model; the default is {wanted}")
        raise RecipeError(
            f"data.max_length is {wanted}, the model has {positions} positions",
            fix=f"data.max_length={positions} or auto",
        )
    return Choice(str(wanted))


def _budget_reason(recipe: Recipe, memory: MemoryPlan) -> str:
    if recipe.train.token_budget != "auto":
        return ""
    return f"tokens per micro-batch, {memory.activation_bytes / 2**20:,.0f} MiB of activations"


def _recompute_reason(recipe: Recipe, memory: MemoryPlan) -> str:
    if recipe.train.recompute != "auto" or not memory.num_recomputed:
        return ""
    return "layers that keep their input only, so that the micro-batch fits"


def _dtype(recipe: Recipe, where: str, device: Device | None) -> Choice:
    if recipe.model.dtype == "auto" and recipe.model.quantization == "fp8":
        return Choice("bfloat16", "fp8 is made from it")
    if device is not None and recipe.model.dtype == "auto":
        return Choice("bfloat16", f"{device.name} multiplies it fastest")
    return choose_dtype(recipe.model.dtype, where)


def _resolved(recipe: Recipe, choices: dict[str, Choice]) -> Recipe:
    """The recipe with every `auto` replaced by what it became."""
    values = recipe.model_dump()
    for name, choice in choices.items():
        section, _, field = name.partition(".")
        is_number = name in ("data.max_length", "train.token_budget", "train.recompute")
        values[section][field] = int(choice.value) if is_number else choice.value
        if name in ("train.compile", "data.streaming"):
            values[section][field] = choice.value == "true"
    return Recipe.parse(values)
