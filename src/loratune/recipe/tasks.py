"""Tasks: what a model can learn, and the table that names the folder of each.

A task is one implementation of `loratune.workflows.tasks.task.Task`. Each package declares what it needs from a task,
and knows nothing of the others:

    recipe/tasks.py            which settings belong to the task           RecipeTask
    planning/task.py           inputs, costs, entries of plan and lock     PlannedTask(RecipeTask)
    reporting/task.py          the words and sections of its pages         ReportedTask
    workflows/tasks/task.py    loss, measures, merge, and all of the above Task(PlannedTask, ReportedTask)

A new task is a new folder with a `TASK` in it, and one line in `TASKS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any

from pydantic import AfterValidator, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from loratune.recipe.sections.base import Contradiction
from loratune.run.errors import RecipeError

TASKS = {
    "causal_lm": "loratune.workflows.tasks.generation",
    "sequence_classification": "loratune.workflows.tasks.classification",
    "preference": "loratune.workflows.tasks.preference",
}
"""Task name → the package that implements it. The packages are imported by name, so no room imports a room above it."""


class RecipeTask(ABC):
    """What a recipe asks of its task.

    Attributes:
        name: The value of `model.task`.
        writes_text: Whether the trained model generates text, so that chatting, serving and GGUF make sense.
        trains_in_processes: Whether several processes can share a run.
    """

    name: str
    writes_text: bool = True
    trains_in_processes: bool = True

    @abstractmethod
    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """Yield each setting that does not belong to the task, as (problem, fix)."""


def load_task(name: str) -> Any:
    """Return the task of that name. Each package types it as the part of a task that the package declares."""
    return import_module(TASKS[name]).TASK


def check_task(recipe: Any) -> None:
    """Refuse sections and settings that do not belong to the recipe's task.

    Raises:
        Contradiction: Naming the setting, its value, and what to do.
    """
    for section in recipe.model_fields_set:
        part = getattr(recipe, section)
        if part.only_for not in ("", recipe.model.task):
            given = next((f"{section}.{field} is {getattr(part, field)}" for field in part.model_fields_set), section)
            raise Contradiction(
                f"{given}, which model.task {recipe.model.task} does not have",
                fix=f"task={part.only_for}, or leave {section} out",
            )
    task: RecipeTask = load_task(recipe.model.task)
    for problem, fix in task.problems(recipe):
        raise Contradiction(problem, fix=fix)


def require_text(recipe: Any, what: str, fix: str = "") -> None:
    """Refuse a verb or option that only models which generate text have.

    Args:
        recipe: The recipe of the run, or of the run to be.
        what: The verb or option.
        fix: What to do instead.

    Raises:
        RecipeError: The recipe's task generates no text.
    """
    task: RecipeTask = load_task(recipe.model.task)
    if not task.writes_text:
        raise RecipeError(
            f"{what} is for models that generate text, but model.task is {task.name}",
            fix=fix or "see the task's page in docs/ for what works with it",
        )


def require_processes(recipe: Any, what: str, fix: str = "") -> None:
    """Refuse several processes or devices where the task trains in one.

    Raises:
        RecipeError: The recipe's task trains in one process.
    """
    task: RecipeTask = load_task(recipe.model.task)
    if not task.trains_in_processes:
        raise RecipeError(f"{what} is not available for model.task {task.name}", fix=fix or "train in one process")


class _TaskNames:
    """The JSON schema of a task name: the keys of the table, as they are when the schema is made."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(TASKS)}


def _known(name: str) -> str:
    if name not in TASKS:
        close = get_close_matches(name, TASKS, n=1, cutoff=0.4)
        fix = f"Did you mean {close[0]}?" if close else f"choose one of {', '.join(TASKS)}"
        raise Contradiction(f"model.task is {name!r}, which is not a task", fix=fix)
    return name


TaskName = Annotated[str, AfterValidator(_known), _TaskNames]
"""The name of a task in `TASKS`; checked when a recipe is read, so that tasks can be added while the program runs."""
