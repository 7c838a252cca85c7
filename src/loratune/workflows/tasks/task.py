"""Everything that a task decides. A task is one subclass in a folder of its own, named in `recipe.tasks.TASKS`.

    settings   problems                                               recipe/tasks.py
    inputs     positions, resolve_model, skeleton, read_data, prompts planning/task.py
    costs      num_outputs, logits_rows, step_costs                   planning/task.py
    records    plan_entries, lock_entries                             planning/task.py
    words      those of the report and the model card                 reporting/task.py
    training   make_loss, plain_loss, before_training                 here
               reference_trainer, check_reference                     here
    evaluation measures, compare, tables                              here
    export     merge; whatever needs text asks `writes_text`          here
    init       starter_settings                                       here

`TextGeneration` is the whole of it for models that write text; a task that trains them differently inherits from it and
overrides what differs.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from loratune.planning.task import PlannedTask
from loratune.recipe.tasks import load_task
from loratune.reporting.task import ReportedTask

if TYPE_CHECKING:  # heavy: recipes are checked by their task before torch is needed
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from peft import PeftModel
    from rich.console import RenderableType

    from loratune.data.examples import Example
    from loratune.data.rows.row import Row
    from loratune.evaluation.user_metric import UserMetric
    from loratune.planning.preparation import Preparation
    from loratune.recipe.recipe import Recipe
    from loratune.run.directory import Record, RunDir
    from loratune.run.progress import Progress
    from loratune.training.event_log import EventLog
    from loratune.training.held_out_loss import Nll
    from loratune.training.loss import SupervisedLoss
    from loratune.training.token_budget import TokenBudget
    from loratune.training.trainer import RunTrainer, TrainerSetup
    from loratune.workflows.certify import Exported


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A run whose model is loaded, with the adapter as it begins: fresh, or that of `lora.start_from`.

    Attributes:
        prepared: The prepared run.
        run: Its directory.
        model: The base model with the adapter.
        loss: The model's loss.
        progress: Shows how far it is.
    """

    prepared: Preparation
    run: RunDir
    model: PeftModel
    loss: SupervisedLoss
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a task compares base and fine-tuned model with.

    Attributes:
        prepared: The prepared run.
        model: The base model with the adapter.
        started: Whether the run began with the adapter of `lora.start_from`, which it is compared with.
        before: Returns a context in which the model is the one before the run's first step.
        loss: The model's loss.
        budget: Cuts the examples into micro-batches.
        events: Receives what goes wrong on the way.
        progress: Shows how far the evaluation is.
        run: The run directory.
        base_nll: The losses before the run, if they are known already.
        tuned_nll: The fine-tuned model's losses, if they are known already.
        metric: A metric of the user's, instead of the recipe's.
    """

    prepared: Preparation
    model: PeftModel
    started: bool
    before: Callable[[], AbstractContextManager[None]]
    loss: SupervisedLoss
    budget: TokenBudget
    events: EventLog
    progress: Progress
    run: RunDir
    base_nll: Nll | None = None
    tuned_nll: Nll | None = None
    metric: UserMetric | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The record of an evaluation, and the losses of each held-out example that it was made from."""

    record: Record
    base_nll: Nll
    tuned_nll: Nll


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStarter:
    """What `init` writes for rows that a task recognizes as its own.

    Attributes:
        settings: Setting → value and the reason for it.
        num_rows: Rows that can be trained on.
        unit: One row, in a word.
        of_what: Follows the number of rows in the title.
    """

    settings: dict[str, tuple[Any, str]]
    num_rows: int
    unit: str
    of_what: str


class Task(PlannedTask, ReportedTask):
    """What a model learns, and everything that depends on it."""

    @abstractmethod
    def make_loss(self, model: PeftModel, examples: Sequence[Example], recipe: Recipe) -> tuple[SupervisedLoss, str]:
        """Return the fastest loss that equals the plain one on these examples, and why it is not the fastest there
        is."""

    @abstractmethod
    def plain_loss(self, model: PeftModel, recipe: Recipe) -> SupervisedLoss:
        """Return the loss of stock libraries' forward pass, one example at a time."""

    @abstractmethod
    def reference_trainer(self, setup: TrainerSetup) -> RunTrainer:
        """Return the trainer of `train.engine: trl`, which the fast engine must equal."""

    def before_training(self, started: Started) -> Preparation:
        """Compute what needs the model as it is before step 1, or before going on; return the prepared run with it."""
        return started.prepared

    def check_reference(self, model: Any) -> None:
        """Raise a RecipeError if `train.engine: trl` cannot train this base model."""

    @abstractmethod
    def measures(self, recipe: Recipe, metric: UserMetric | None) -> list[str]:
        """Return the names that `--gate` may use."""

    @abstractmethod
    def compare(self, comparison: Comparison) -> Compared:
        """Measure base and fine-tuned model on the held-out examples."""

    @abstractmethod
    def tables(self, evaluation: Record) -> list[RenderableType]:
        """Return an evaluation as tables for a terminal."""

    @abstractmethod
    def merge(self, root: str | Path, target: Path, *, dtype: str, progress: Progress) -> Exported:
        """Write base and adapter of a finished run as one model, with a certificate.

        Args:
            root: The run directory.
            target: The folder to write.
            dtype: `float32`, `bfloat16`, `float16`, or `auto`.
            progress: Shows how far it is.
        """

    def starter_settings(self, rows: Sequence[Row]) -> TaskStarter | None:
        """Return what `init` writes for these rows; None if they are not this task's."""
        return None

    def check_script(self, recipe: Recipe) -> None:
        """Check that a plain script (`loratune eject`) can follow what a recipe asks of this task.

        Raises:
            RecipeError: It cannot.
        """


def task_of(recipe: Recipe) -> Task:
    """Return the recipe's task."""
    return cast("Task", load_task(recipe.model.task))


def task_named(name: str) -> Task:
    """Return the task that `model.task` names."""
    return cast("Task", load_task(name))
