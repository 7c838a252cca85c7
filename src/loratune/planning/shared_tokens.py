"""What `train.share_prefixes` becomes, and the tokens it saves: a function of recipe and data, not of the machine.

With dropout, sequences of a step that begin with the same tokens have one mask there, so the setting is part of the
mathematics of a run. Whether a device and a model also compute equal prefixes once is found out when the weights are
loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loratune.data.examples import LabeledExample
from loratune.data.shared_prefixes import SHARING_DEVICE, num_distinct
from loratune.data.steps import num_steps_per_epoch, step_examples
from loratune.model.device import Choice
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.examples import Example
    from loratune.data.prepared import PreparedData
    from loratune.recipe.recipe import Recipe

LEAST_FRACTION = 0.05
"""Fraction of the tokens that must be saved for `auto` to share."""

COUNTED_STEPS = 64
"""Steps of an epoch whose shared tokens are counted, evenly spread."""


def with_shared_prefixes(
    recipe: Recipe, data: PreparedData, device: str
) -> tuple[Recipe, PreparedData, dict[str, Choice]]:
    """Return the recipe with `train.share_prefixes` resolved, the data with the tokens it saves, and what it became.

    Args:
        recipe: The recipe.
        data: Its data.
        device: The type of device that trains, which decides what is saved and nothing else.

    Raises:
        RecipeError: Sharing is asked for, and the recipe excludes it.
    """
    wanted, reason = recipe.train.share_prefixes, _obstacle(recipe, data)
    if wanted is True and reason:
        raise RecipeError(f"train.share_prefixes is true, but {reason}", fix="train.share_prefixes=auto")
    fraction = 0.0 if wanted is False else shared_fraction(data.train, recipe)
    shares = wanted is True or (wanted == "auto" and not reason and fraction >= LEAST_FRACTION)
    saves = shares and device == SHARING_DEVICE
    told = ""
    if shares or fraction >= LEAST_FRACTION:
        told = f"{fraction:.0%} of the tokens are shared prefixes"
        told += f", but {reason}" if not shares else "" if saves else f"; only a {SHARING_DEVICE} computes them once"
    train = recipe.train.model_copy(update={"share_prefixes": shares})
    return (
        recipe.model_copy(update={"train": train}),
        replace(data, shared_fraction=fraction if saves else 0.0),
        {"train.share_prefixes": Choice(str(shares).lower(), told)},
    )


def shared_fraction(examples: Sequence[Example], recipe: Recipe) -> float:
    """Return the fraction of the tokens of a step that are laid out once with others, over steps of the first epoch.

    A step that is split into micro-batches, or divided among processes, saves less.
    """
    batch_size, seed = recipe.train.batch_size, recipe.train.seed
    num_steps = num_steps_per_epoch(len(examples), batch_size)
    tokens = distinct = 0
    for index in np.unique(np.linspace(0, num_steps - 1, min(num_steps, COUNTED_STEPS)).astype(int)).tolist():
        numbers = step_examples(len(examples), batch_size=batch_size, seed=seed, epoch=0, index=index)
        sequences = [sequence.input_ids for i in numbers for sequence in examples[i].sequences]
        tokens += sum(map(len, sequences))
        distinct += num_distinct(sequences)
    return 1 - distinct / tokens


def _obstacle(recipe: Recipe, data: PreparedData) -> str:
    """Return why the recipe excludes sharing; empty if it does not."""
    if recipe.train.engine == "trl":
        return "train.engine is trl, which pads examples"
    if any(isinstance(example, LabeledExample) for example in data.train[:1]):
        return "a classifier reads whole texts"
    if recipe.train.neftune_noise_alpha:
        return "the noise of train.neftune_noise_alpha depends on the length of each example"
    return ""
