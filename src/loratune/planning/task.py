"""What planning asks of a task: where examples come from, and what is different about the cost of a step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from loratune.recipe.tasks import RecipeTask, load_task

if TYPE_CHECKING:  # heavy: recipes are checked by their task before torch is needed
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.data.prepared import PreparedData
    from loratune.data.prompts import Prompt
    from loratune.model.classifier import Classes
    from loratune.model.device import Choice
    from loratune.model.load import BaseModel
    from loratune.recipe.recipe import Recipe
    from loratune.run.directory import Record
    from loratune.run.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskModel:
    """A base model as its task needs it, before any weights are loaded.

    Attributes:
        config: The model's configuration.
        tokenizer: The base model's tokenizer, set up for the task.
        classes: Names and head of a model that classifies; None for one that generates text.
        data: The examples, where they had to be read to know the model (the classes are in the data); else None.
        notes: What a user would not expect of the model, a sentence each.
    """

    config: Any
    tokenizer: PreTrainedTokenizerBase
    classes: Classes | None = None
    data: PreparedData | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What decides the cost of a step besides layers and tokens.

    Attributes:
        is_padded: Whether the examples of a micro-batch are padded to its longest one.
        can_time_layers: Whether timing two decoder layers predicts the time of a step.
        times_head: Whether the head takes time worth counting.
        why_uncompiled: The reason why layers are never compiled; empty if they can be.
    """

    is_padded: bool = False
    can_time_layers: bool = True
    times_head: bool = True
    why_uncompiled: str = ""


class PlannedTask(RecipeTask):
    """What planning asks of a task.

    Attributes:
        is_supervised: Whether the model learns what the data says, so that rates of supervised fine-tuning fit.
    """

    is_supervised: bool = True

    def choices(self, recipe: Recipe) -> dict[str, Choice]:
        """Return what the task's own settings that are `auto` become, and why."""
        return {}

    def untrained_passes(self, recipe: Recipe, epochs: float) -> tuple[float, float]:
        """Return how often training and held-out examples go through the model to be compared with, not trained.

        Args:
            recipe: The recipe.
            epochs: Epochs of the run.
        """
        return 0, 0

    @abstractmethod
    def positions(self, recipe: Recipe, config: Any) -> int | None:
        """Return the most tokens that an example can have; None if the model states no limit.

        Raises:
            RecipeError: The task cannot use a model of this kind.
        """

    @abstractmethod
    def resolve_model(
        self, recipe: Recipe, base: BaseModel, config: Any, max_length: int, progress: Progress
    ) -> TaskModel:
        """Return the configuration and tokenizer that the task trains with."""

    @abstractmethod
    def skeleton(self, config: Any, *, trust_remote_code: bool) -> PreTrainedModel:
        """Build the model on the meta device."""

    @abstractmethod
    def read_data(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress
    ) -> tuple[Choice, PreparedData]:
        """Return whether rows are streamed, and the examples with their report. Not called if `resolve_model` had to
        read them."""

    @abstractmethod
    def render_again(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        """Return the training examples of a recipe with another data section, without any cache."""

    @abstractmethod
    def prompts(self, recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, ...]:
        """Return the held-out prompts that base and fine-tuned model answer."""

    @abstractmethod
    def num_outputs(self, config: Any) -> int:
        """Return the columns of the logits: the vocabulary, or the classes."""

    @abstractmethod
    def logits_rows(self, recipe: Recipe, config: Any, device: str) -> int:
        """Return the rows of logits that the loss computes at a time."""

    def step_costs(self, model: Any) -> StepCosts:
        """Return what else decides the cost of a step. `model` may be on the meta device."""
        return StepCosts()

    def plan_entries(self, classes: Classes | None) -> Record:
        """Return what the task adds to `plan.json` under `data`."""
        return {}

    def lock_entries(self, classes: Classes | None) -> Record:
        """Return what the task adds to `lock.json` under `inputs`."""
        return {}


def planned_task(recipe: Recipe) -> PlannedTask:
    """Return the recipe's task as planning sees it."""
    return cast("PlannedTask", load_task(recipe.model.task))
