"""The facts that the effects in `explain` are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.planning.auto import NO_LIMIT
from loratune.planning.parameters import ParameterCount, count_parameters
from loratune.recipe.recipe import DataSection
from loratune.training.hf_arguments import learning_rate_factor
from loratune.workflows.tasks.task import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loratune.data.examples import Example
    from loratune.planning.preparation import Preparation

AlternativeRow = dict[str, str]
MIB = 2**20


@dataclass(frozen=True)
class Facts:
    """Facts about a prepared run, each computed once and only when needed.

    Attributes:
        prepared: The run as it would start.
    """

    prepared: Preparation

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base model without weights."""
        return self.prepared.model.skeleton

    @cached_property
    def base_parameters(self) -> int:
        return self.prepared.adapter.parameters.total - self.prepared.adapter.parameters.trainable

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each training example; for streamed data the lengths of the sample, repeated."""
        data = self.prepared.data
        return np.resize([len(example.input_ids) for example in data.train], data.num_examples).tolist()

    @cached_property
    def learning_rates(self) -> np.ndarray:
        """Learning rate of each optimizer step, float64 [steps], from the schedule that training uses."""
        return learning_rates(self.prepared.recipe.train, self.prepared.estimate.num_steps)

    def count(self, r: int) -> ParameterCount:
        """Count parameters at another rank."""
        lora = self.prepared.recipe.lora.model_copy(update={"r": r})
        return count_parameters(self.model, self.prepared.adapter.targets, lora, self.head)

    @property
    def head(self) -> tuple[str, ...]:
        """Modules of a classifier's head."""
        return self.prepared.model.head

    def render_again(self, **settings: Any) -> list[Example]:
        """Render the training examples again under other settings of the data section."""
        recipe = self.prepared.recipe
        data = DataSection.model_validate({**recipe.data.model_dump(), **settings})
        limit = NO_LIMIT if data.max_length == "auto" else int(data.max_length)
        other = recipe.model_copy(update={"data": data})
        return task_of(recipe).render_again(other, self.prepared.model.tokenizer, limit)


def learning_rates(train: Any, steps: int) -> np.ndarray:
    """Compute the learning rate of each optimizer step, float64 [steps].

    Args:
        train: The recipe's train section.
        steps: Number of optimizer steps of the run.
    """
    factor = learning_rate_factor(train, steps)
    return train.learning_rate * np.array([factor(step) for step in range(steps)])


def nearby_powers(value: int) -> list[int]:
    """Return a quarter, half, one, two and four times a count, without duplicates."""
    return sorted({max(1, value // 4), max(1, value // 2), value, 2 * value, 4 * value})


def bytes_in_words(num_bytes: int) -> str:
    """Format bytes in MiB or KiB."""
    unit, name = (MIB, "MiB") if num_bytes >= MIB else (2**10, "KiB")
    return f"{num_bytes / unit:,.1f} {name}"
