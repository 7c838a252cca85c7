"""The four target presets side by side: what each would train of this model, and what it would cost.

Memory and time are those of `estimate` for the recipe's own targets, with the formulas of `cost` at the same speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratune.model.adapter.targets import describe_targets, resolve_targets
from loratune.planning.cost import run_flops, run_memory
from loratune.planning.parameters import ParameterCount, count_parameters
from loratune.recipe.recipe import TARGET_PRESETS, LoraSection, Recipe
from loratune.run.errors import MachineError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from loratune.data.prepared import PreparedData
    from loratune.planning.estimate import Estimate
    from loratune.run.directory import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetCount:
    """One preset on one model.

    Attributes:
        name: The preset.
        targets: Full names of the adapted modules.
        targets_in_words: The same, for people; if the preset does not fit this model, the reason.
        parameters: Exact counts; None if the preset does not fit.
    """

    name: str
    targets: tuple[str, ...]
    targets_in_words: str
    parameters: ParameterCount | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetPlan:
    """One target preset: exact counts, and what training it would cost.

    Attributes:
        count: What it would train.
        peak_bytes: Peak memory; None if that does not fit the machine, or the preset does not fit the model.
        train_seconds: Seconds of all optimizer steps; None if the preset does not fit the model.
    """

    count: PresetCount
    peak_bytes: int | None
    train_seconds: float | None

    def scaled(self, factor: float) -> PresetPlan:
        """Return the same preset at another speed."""
        return replace(self, train_seconds=self.train_seconds and self.train_seconds * factor)

    def as_record(self) -> Record:
        """Return the entry of `plan.json`."""
        parameters = self.count.parameters
        return {
            "targets": self.count.targets_in_words,
            "trainable": parameters and parameters.trainable,
            "share": parameters and parameters.trainable / parameters.total,
            "adapter_bytes": parameters and parameters.adapter_bytes,
            "peak_bytes": self.peak_bytes,
            "train_seconds": self.train_seconds,
        }


def count_presets(model: nn.Module, lora: LoraSection, head: Sequence[str] = ()) -> tuple[PresetCount, ...]:
    """Count every preset on this model.

    Args:
        model: The base model, without an adapter. It may be on the meta device.
        lora: Rank, variant and layers; its targets are ignored.
        head: Modules of a classifier's head, which are trained in full.
    """
    return tuple(_count(model, preset, lora, head) for preset in TARGET_PRESETS)


def _count(model: nn.Module, preset: str, lora: LoraSection, head: Sequence[str]) -> PresetCount:
    try:
        targets = resolve_targets(model, preset, lora.layers)
        parameters = count_parameters(model, targets, lora, head)
    except RecipeError as error:
        return PresetCount(name=preset, targets=(), targets_in_words=error.problem, parameters=None)
    return PresetCount(
        name=preset,
        targets=targets,
        targets_in_words=describe_targets(model, preset, lora.layers),
        parameters=parameters,
    )


def plan_preset(
    count: PresetCount, recipe: Recipe, config: Any, model: Any, data: PreparedData, estimated: Estimate
) -> PresetPlan:
    """Return memory and time of a preset, with the formulas of the run itself at the speed that was measured for it.

    Args:
        count: What the preset would train.
        recipe: The recipe; its targets are ignored.
        config: The model's text configuration.
        model: The model on the meta device.
        data: Training examples.
        estimated: The estimate for the recipe's own targets.
    """
    if count.parameters is None:
        return PresetPlan(count=count, peak_bytes=None, train_seconds=None)
    try:
        peak = run_memory(recipe, config, count.parameters, estimated.work, estimated.place).peak_bytes
    except MachineError:
        peak = None
    clock = estimated.time
    seconds = clock.train_seconds * run_flops(recipe, model, count.parameters, data) / clock.flops
    return PresetPlan(count=count, peak_bytes=peak, train_seconds=seconds)
