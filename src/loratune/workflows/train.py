"""`loratune train`: prepare the run, create its directory, and take it from the weights to the report (`steps`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratune.planning.auto import output_dir
from loratune.planning.prepare import prepare_on_all_ranks
from loratune.recipe.recipe import Recipe, as_recipe
from loratune.run import processes
from loratune.run.directory import RunDir
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.run_log import RunLog
from loratune.workflows.resume import continue_run, was_relaunched
from loratune.workflows.start import start_run
from loratune.workflows.steps import Leg, run_from_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import TrainerCallback

    from loratune.planning.preparation import Preparation
    from loratune.workflows.result import RunResult


def train(
    recipe: Recipe | str | Path,
    *,
    written: str | None = None,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
    on_plan: Callable[[Preparation], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Fine-tune, and compare base and fine-tuned model on held-out data.

    Args:
        recipe: What to do: a recipe, or its file.
        written: The recipe as the user wrote it, which is kept in the run directory.
        overwrite: Whether an existing run in the output directory may be deleted.
        progress: Shows how far the run is.
        on_plan: Called with the `Preparation` before the weights load.
        callbacks: transformers' `TrainerCallback`s, called after ours at every event of the trainer. They may stop the
            run, evaluate or save by the trainer's control flags.

    Raises:
        RecipeError, DataError, MachineError: Nothing was started.
        Interrupted: The user stopped it; `resume` continues it.
        RunError: It failed while running.
    """
    processes.start()
    if not isinstance(recipe, Recipe):
        written = Path(recipe).read_text(encoding="utf-8") if written is None and Path(recipe).is_file() else written
        recipe = as_recipe(recipe)
    leg = Leg(callbacks=callbacks)
    if was_relaunched(RunDir.at(output_dir(recipe))):
        run = RunDir.open(output_dir(recipe))
        with RunLog(progress, run.log) as log:
            return continue_run(run, log, leg=leg)
    written = written if written is not None else recipe.to_yaml()
    with RunLog(progress) as log:
        return _train(recipe, written, log, overwrite=overwrite, on_plan=on_plan, leg=leg)


def _train(
    recipe: Recipe,
    written: str,
    progress: RunLog,
    *,
    overwrite: bool,
    on_plan: Callable[[Preparation], None] | None,
    leg: Leg,
) -> RunResult:
    root = output_dir(recipe)
    if processes.is_main():
        RunDir.check(root, overwrite=overwrite)
    prepared = prepare_on_all_ranks(recipe, progress)
    if not processes.is_main():
        return run_from_weights(prepared, RunDir.at(root), None, progress, leg)
    if on_plan is not None:
        on_plan(prepared)
    run = RunDir.create(root, overwrite=overwrite)
    progress.begin(run.log)
    return start_run(prepared, run, written, progress, leg)
