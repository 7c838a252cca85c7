"""What each `auto` of a recipe becomes, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratune.data.steps import epochs_of, num_steps_per_epoch
from loratune.model.device import Choice, choose_dtype
from loratune.planning.memory.memory import MemoryPlan, free_bytes
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from loratune.planning.hardware.devices import Device

NO_LIMIT = 2**31
"""Stands for no limit of an example's tokens."""


def free_device_bytes(device: str, at_once: int = 1) -> int | None:
    """Return this process's share of the memory that the processes of a machine share; None if it has the device to
    itself.

    Args:
        device: `cpu`, `cuda` or `mps`.
        at_once: How many runs of one process each share the machine.
    """
    sharers = max(processes.local_size(), at_once)
    return None if sharers == 1 or device == "cuda" else free_bytes(device) // sharers


def output_dir(recipe: Recipe) -> Path:
    """Return the run directory; `auto` names it after the model."""
    if recipe.train.output_dir != "auto":
        return Path(recipe.train.output_dir)
    name = recipe.model.name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return Path("__models") / f"{name}-lora-fine-tuned"


def choose_max_length(recipe: Recipe, positions: int | None) -> Choice:
    """Return the most tokens of an example.

    Args:
        recipe: Its `data.max_length` may be `auto`.
        positions: The most tokens that the model can read; None if it states no limit.

    Raises:
        RecipeError: More is asked for than the model has positions.
    """
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


def with_epochs(recipe: Recipe, num_examples: int) -> tuple[Recipe, dict[str, Choice]]:
    """Return the recipe with the epochs that `train.max_steps` makes, and what they became; unchanged without it."""
    train = recipe.train
    if train.max_steps is None:
        return recipe, {}
    epochs = epochs_of(train.max_steps, num_steps_per_epoch(num_examples, train.batch_size))
    overridden = "epochs" in train.model_fields_set and train.epochs != epochs
    reason = f"train.max_steps is {train.max_steps}" + (f", which overrides {train.epochs:g}" if overridden else "")
    changed = recipe.model_copy(update={"train": train.model_copy(update={"epochs": epochs})})
    return changed, {"train.epochs": Choice(f"{epochs:g}", reason)}


def budget_reason(recipe: Recipe, memory: MemoryPlan) -> str:
    """Say what an automatic `train.token_budget` means."""
    if recipe.train.token_budget != "auto":
        return ""
    return f"tokens per micro-batch, {memory.activation_bytes / 2**20:,.0f} MiB of activations"


def recompute_reason(recipe: Recipe, memory: MemoryPlan) -> str:
    """Say why an automatic `train.recompute` is not 0."""
    if recipe.train.recompute != "auto" or not memory.num_recomputed:
        return ""
    return "layers that keep their input only, so that the micro-batch fits"


def choose_base_dtype(recipe: Recipe, where: str, device: Device | None) -> Choice:
    """Return the type of the frozen weights.

    Args:
        recipe: Its `model.dtype` may be `auto`.
        where: cpu, cuda or mps.
        device: The named device to plan for; None for this machine.
    """
    if recipe.model.dtype == "auto" and recipe.model.quantization == "fp8":
        return Choice("bfloat16", "fp8 is made from it")
    if device is not None and recipe.model.dtype == "auto":
        return Choice("bfloat16", f"{device.name} multiplies it fastest")
    return choose_dtype(recipe.model.dtype, where)


def resolve_auto(recipe: Recipe, choices: dict[str, Choice]) -> Recipe:
    """Return the recipe with every `auto` replaced by what it became."""
    values = recipe.model_dump()
    for name, choice in choices.items():
        section, _, field = name.partition(".")
        is_number = name in ("data.max_length", "train.token_budget", "train.recompute")
        values[section][field] = int(choice.value) if is_number else choice.value
        if name == "preference.beta":
            values[section][field] = float(choice.value)
        if name in ("train.compile", "train.share_prefixes", "data.streaming"):
            values[section][field] = choice.value == "true"
    return Recipe.parse(values)
