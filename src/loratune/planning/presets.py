"""The four target presets side by side: what each would train of this model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from loratune.errors import RecipeError
from loratune.model.targets import describe_targets, resolve_targets
from loratune.planning.parameters import ParameterCount, count_parameters
from loratune.recipe import TARGET_PRESETS, LoraSection


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetCount:
    """One preset on one model.

    Attributes:
        name: The preset.
        targets: Full names of the adapted modules.
        targets_in_words: The same for people; where the preset does not fit this model, why not.
        parameters: Exact counts; None where the preset does not fit.
    """

    name: str
    targets: tuple[str, ...]
    targets_in_words: str
    parameters: ParameterCount | None


def count_presets(model: nn.Module, lora: LoraSection) -> tuple[PresetCount, ...]:
    """Every preset on this model.

    Args:
        model: The base model, without an adapter. It may be on the meta device.
        lora: Rank and variant; its targets do not count.
    """
    return tuple(_count(model, preset, lora) for preset in TARGET_PRESETS)


def _count(model: nn.Module, preset: str, lora: LoraSection) -> PresetCount:
    try:
        targets = resolve_targets(model, preset)
    except RecipeError as error:
        return PresetCount(name=preset, targets=(), targets_in_words=error.problem, parameters=None)
    return PresetCount(
        name=preset,
        targets=targets,
        targets_in_words=describe_targets(model, preset),
        parameters=count_parameters(model, targets, lora),
    )
