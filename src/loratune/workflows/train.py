"""What each verb does, in order: the one module that knows every stage.

plan        prepare, and tell
train       prepare → run directory → weights and adapter → steps → adapter saved → base against tuned
resume      what of that is left, after checking that nothing it depends on changed
evaluate    base against tuned, of a finished run

Of several processes (`world`) each goes this way until the last step is taken; then the first one saves and evaluates alone, or
where they share the base (`shards`), evaluates with the others in step.
"""

from __future__ import annotations

from collections.abc import Callable

from loratune.data.preview import preview
from loratune.planning.auto import output_dir
from loratune.planning.preparation import Preparation
from loratune.planning.prepare_ranks import prepare_on_all_ranks
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.directory import RunDir, write_json, write_text
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.result import RunResult
from loratune.workflows.resume import continue_run, was_relaunched
from loratune.workflows.steps import run_from_weights, write_lock

PREVIEW_EXAMPLES = 5
"""Examples whose tokens are kept in the run directory."""


def train(
    recipe: Recipe,
    *,
    written: str | None = None,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
    on_plan: Callable[[Preparation], None] | None = None,
) -> RunResult:
    """Fine-tune, and evaluate base against tuned.

    Args:
        recipe: What to do.
        written: The recipe as the user wrote it, kept in the run directory.
        overwrite: Whether a run that is there already may be deleted.
        progress: Who is told how it goes.
        on_plan: Called with the `Preparation` before the weights load.

    Raises:
        RecipeError, DataError, MachineError: Nothing was started.
        Interrupted: The user stopped it; `resume` goes on.
        RunError: It failed while running.
    """
    processes.start()
    root = output_dir(recipe)
    if was_relaunched(RunDir.at(root)):
        return continue_run(RunDir.open(root), progress)
    if processes.is_main():
        RunDir.check(root, overwrite=overwrite)
    prepared = prepare_on_all_ranks(recipe, progress)
    if not processes.is_main():
        return run_from_weights(prepared, RunDir.at(root), None, progress)
    if on_plan is not None:
        on_plan(prepared)
    run = RunDir.create(root, overwrite=overwrite)
    with run.exclusive():
        write_text(run.recipe, written if written is not None else recipe.to_yaml())
        write_json(run.data, prepared.data.report)
        write_json(run.preview, preview(prepared.data.train, prepared.model.tokenizer, PREVIEW_EXAMPLES).as_record())
        write_json(run.plan, prepared.as_plan())
        write_lock(prepared, run)
        return run_from_weights(prepared, run, None, progress)
