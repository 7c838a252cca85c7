"""`loratune resume`: finish an interrupted run, after checking that nothing it depends on has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.planning.lock import changed_inputs, changed_settings
from loratune.planning.prepare import prepare_on_all_ranks
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.run_log import RunLog
from loratune.training.checkpoint import checkpoints_in, newest_valid_checkpoint, resume_state
from loratune.training.fsdp import is_sharded
from loratune.workflows.locked_recipe import located
from loratune.workflows.result import RunResult
from loratune.workflows.steps import FULL_RUN, Leg, finish_trained_run, run_from_weights, settings_as_written

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import TrainerCallback

    from loratune.planning.preparation import Preparation

_NEXT, _EVALUATE = "checkpoint", "evaluate"
"""The key under which rank 0 stores the checkpoint to resume from, and the value that means: only the evaluation is
left."""


def resume(
    root: str | Path, *, progress: Progress = NO_PROGRESS, callbacks: Sequence[TrainerCallback] = ()
) -> RunResult:
    """Resume an interrupted run: from its newest valid checkpoint, or with the evaluation if all steps are done.

    Args:
        root: The run directory.
        progress: Shows how far the run is.
        callbacks: As for `train`; a run does not remember those it began with.

    Raises:
        RecipeError: The run is finished, or its recipe, model, template or data changed since it started.
        RunError: All its checkpoints are damaged.
    """
    processes.start()
    run = RunDir.open(root)
    if run.is_complete:
        raise _finished(run)
    with RunLog(progress, run.log) as log:
        return continue_run(run, log, leg=Leg(callbacks=callbacks))


def _finished(run: RunDir) -> RecipeError:
    """Return the refusal of a finished run, which names the way to train it further."""
    now = settings_as_written(run)
    changed = changed_settings(read_json(run.lock).get("written", now), now)
    edited = f"; what was changed in its recipe since is not trained: {', '.join(changed)}" if changed else ""
    more = f"loratune extend {run.root}" + ("" if changed else f" train.epochs={2 * now['train']['epochs']:g}")
    if not checkpoints_in(run.checkpoints):  # and so no state of the optimizer
        more = start_from_command(run)
    return RecipeError(
        f"the run is finished{edited}",
        file=run.root,
        fix=f"train it further as a new run, `{more}`; or compare it again, `loratune evaluate {run.root}`",
    )


def start_from_command(run: RunDir) -> str:
    """Return the command that trains a run's adapter further, with a new optimizer."""
    return f"loratune train {run.recipe} lora.start_from={run.adapter} train.output_dir={run.root}-more"


def was_relaunched(run: RunDir) -> bool:
    """Return whether torchrun restarted the processes that started this run, after one of them was killed."""
    launch = processes.launch_id()
    return processes.gather(bool(launch) and run.lock.is_file() and read_json(run.lock).get("launch") == launch)[0]


def continue_run(
    run: RunDir, progress: Progress, prepared: Preparation | None = None, leg: Leg = FULL_RUN
) -> RunResult:
    """Resume on every rank: check what changed, agree on a checkpoint, and continue from it.

    Args:
        run: The run.
        progress: Shows how far it is.
        prepared: What `prepare` found out of the recipe in the run's lock; None: it is found out now.
        leg: How far to go.
    """
    lock = read_json(run.lock)
    if "written" not in lock:
        raise RecipeError(
            "the run was started by an earlier version, which did not record enough to resume it", file=run.lock
        )
    processes.gather(None)  # every rank has read the lock before rank 0 changes anything
    with run.exclusive():
        if processes.is_main():
            run.clean()
            changed = changed_settings(lock["written"], settings_as_written(run))
            _refuse(changed, run.recipe, f"restore it; or `loratune extend {run.root}`, which trains with the change")
        prepared = prepared or prepare_on_all_ranks(Recipe.parse(located(lock), file=run.lock), progress)
        if not processes.is_main():
            return _follow_main(prepared, run, progress, leg)
        _refuse(_changed_inputs(lock, prepared, run), run.lock)
        if run.has_adapter:
            processes.store_set(_NEXT, _EVALUATE)
            if not is_sharded(prepared.recipe):
                processes.stop()
            progress.line("all steps are done and the adapter is saved; resuming with the evaluation")
            return finish_trained_run(prepared, run, progress, leg)
        checkpoint = newest_valid_checkpoint(run, progress)
        _require_initial_adapter(lock, checkpoint, run)
        step = resume_state(checkpoint) if checkpoint is not None else 0
        run.rewind_metrics(step)
        processes.store_set(_NEXT, checkpoint.name if checkpoint is not None else "")
        if checkpoint is None:
            progress.line("no checkpoint yet: starting again with the first step")
        else:
            progress.line(f"resuming after step {step}")
        return run_from_weights(prepared, run, checkpoint, progress, leg)


def _follow_main(prepared: Preparation, run: RunDir, progress: Progress, leg: Leg) -> RunResult:
    """Do on the other ranks what rank 0 decided."""
    name = processes.store_wait(_NEXT)
    if name == _EVALUATE and is_sharded(prepared.recipe):
        return finish_trained_run(prepared, run, progress, leg)
    if name == _EVALUATE:
        processes.stop()
        return RunResult(run=run, evaluation=None)
    checkpoint = run.checkpoints / name if name else None
    if checkpoint is not None and not checkpoint.is_dir():
        raise RunError(
            "the checkpoint is not on this machine", file=checkpoint, fix="use a folder that all machines share"
        )
    return run_from_weights(prepared, run, checkpoint, progress, leg)


def _changed_inputs(lock: Record, prepared: Preparation, run: RunDir) -> list[str]:
    # Stopped while the weights were fetched: a commit's files do not change, but the lock may not list all of them yet.
    known_only = bool(prepared.model.base.revision) and not run.metrics.is_file()
    return changed_inputs(lock, prepared.as_lock(), known_only=known_only)


def _require_initial_adapter(lock: Record, checkpoint: Path | None, run: RunDir) -> None:
    """Refuse to start an extended run without the checkpoint that it began with."""
    lineage = lock.get("extends")
    if checkpoint is None and lineage is not None and not lineage["exact"]:
        raise RunError(
            f"the checkpoint that this run began with is gone, of {lineage['run']}",
            file=run.checkpoints,
            fix=f"`{lineage['command']} --overwrite`",
        )


def _refuse(
    changed: list[str], file: Path, fix: str = "restore it, or start over with `loratune train … --overwrite`"
) -> None:
    if changed:
        raise RecipeError(f"changed since the run started: {', '.join(changed)}", file=file, fix=fix)
