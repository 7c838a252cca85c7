"""The course of a run, from the weights to the report; `train`, `resume` and `sweep` differ only in where they enter
it.

    load base → attach adapter and loss → train_steps → final adapter saved → base vs. fine-tuned → model card → report

Every rank does this up to the last step. Then rank 0 saves and evaluates alone, unless the ranks share the base model
(`training.fsdp`): they evaluate in step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loratune.data.mixture import held_out_groups, source_of_file
from loratune.data.steps import num_steps_per_epoch
from loratune.model.adapter.variants import has_changed_base
from loratune.model.device import free_memory
from loratune.planning.memory.memory import wants_rehearsal
from loratune.recipe.recipe import Recipe
from loratune.reporting.html import report_or_warn
from loratune.reporting.model_card import write_card
from loratune.run import processes
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import Interrupted
from loratune.run.records.files import write_record
from loratune.run.records.lock import LockRecord
from loratune.run.run_log import RunLog
from loratune.training.callbacks import RunCallback
from loratune.training.checkpoint import resume_state
from loratune.training.fast_trainer import FastTrainer
from loratune.training.fsdp import explain_lost_process
from loratune.training.gradient_sync import check_ranks_agree
from loratune.training.held_out_loss import EvaluationStoppedError, evaluate_on_all_ranks
from loratune.training.hf_arguments import TrainingData, branch_step
from loratune.training.signals import StopRequest, stop_after_step
from loratune.training.trainer import TrainerSetup
from loratune.workflows.assess import compare_base_and_tuned, explain_out_of_memory
from loratune.workflows.final_adapter import save_final, select_final_adapter
from loratune.workflows.load import attach_adapter_and_loss, load_base, load_trained
from loratune.workflows.measured import RunTimer
from loratune.workflows.result import RunResult
from loratune.workflows.samples import sample_callbacks
from loratune.workflows.tasks.task import Started, task_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from transformers import TrainerCallback

    from loratune.planning.preparation import Preparation
    from loratune.run.progress import Progress
    from loratune.training.held_out_loss import Nll
    from loratune.training.loss import SupervisedLoss
    from loratune.training.trainer import RunTrainer

_UNEVALUATED = "stopped before the evaluation; all steps are done, and the adapter is saved"


class Paused(Interrupted):
    """A run has reached the end of its `Leg`, and has a checkpoint to continue from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """How far a call takes a run. A run in several legs ends as the one that was never paused.

    Attributes:
        load: Loads the base model without an adapter, as `load_base` does; None for that. Runs may share a base.
        until: The step after which the run is paused, with a checkpoint; None: it goes to its end.
        dropped: The step of the pause before, whose checkpoint is deleted when the run has gone on, unless the recipe
            saves one there. None: there was no pause.
        on_losses: Called with a step and the held-out losses there, at the pause; with None and those of the final
            adapter, at the end.
        base_losses: Held-out losses before the first step, which runs on the same base share: a run takes what another
            one measured, or adds its own. None: it measures them.
        callbacks: The user's own callbacks of the trainer.
    """

    load: Callable[[Preparation, Progress], Any] | None = None
    until: int | None = None
    dropped: int | None = None
    on_losses: Callable[[int | None, Nll], None] | None = None
    base_losses: dict[str, Nll] | None = None
    callbacks: Sequence[TrainerCallback] = ()


FULL_RUN = Leg()
"""From where a run is to its end."""


def settings_as_written(run: RunDir) -> Record:
    """Return the settings of RUN/recipe.yaml with `auto` unresolved."""
    return Recipe.load(run.recipe).model_dump(mode="json")


def run_from_weights(
    prepared: Preparation, run: RunDir, checkpoint: Path | None, progress: Progress, leg: Leg = FULL_RUN
) -> RunResult:
    """Train from the loaded weights on, evaluate, and write everything that follows.

    Args:
        prepared: The prepared run.
        run: Its directory.
        checkpoint: The checkpoint to resume from; None for the first step.
        progress: Shows how far the run is.
        leg: How far to go.

    Raises:
        Paused: The leg ends before the run does.
    """
    timer = RunTimer(run, prepared.recipe.train.device)
    model, loss = _load(prepared, run, checkpoint, progress, leg)
    prepared = task_of(prepared.recipe).before_training(
        Started(prepared=prepared, run=run, model=model, loss=loss, progress=progress)
    )
    stop = StopRequest()
    try:
        with explain_out_of_memory(run), explain_lost_process():
            last_step, tuned_nll = train_steps(prepared, run, model, loss, checkpoint, stop, progress, leg)
        if loss.sharded:
            stop.agree(processes.gather(stop.asked or 0))
        else:
            processes.stop()
            if not processes.is_main():
                return RunResult(run=run, evaluation=None)
        if select_final_adapter(prepared, run, model, last_step, progress):
            tuned_nll = None
        if processes.is_main():
            save_final(prepared, run, model)
        if stop:
            raise stop.as_error(_UNEVALUATED, run)
    except Interrupted:
        timer.note()
        raise
    timer.note()
    if has_changed_base(model):  # the comparison is with the base that everybody has, and this variant changed it
        del model, loss
        free_memory()
        model, loss = load_trained(prepared, run, progress, leg.load)
        tuned_nll = None
    return _finish(prepared, run, model, loss, timer, progress, leg, tuned_nll)


def finish_trained_run(prepared: Preparation, run: RunDir, progress: Progress, leg: Leg = FULL_RUN) -> RunResult:
    """Evaluate a run whose adapter is saved, or only write its report if that is done too."""
    timer = RunTimer(run, prepared.recipe.train.device)
    if "measured" in read_json(run.plan):
        if processes.is_main():
            report_or_warn(run, progress)
        return RunResult(run=run, evaluation=read_json(run.evaluation) if prepared.data.eval else None)
    model, loss = load_trained(prepared, run, progress, leg.load)
    return _finish(prepared, run, model, loss, timer, progress, leg)


def _finish(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    timer: RunTimer,
    progress: Progress,
    leg: Leg,
    tuned_nll: Nll | None = None,
) -> RunResult:
    """Evaluate, and write model card, measurements and report."""
    evaluation, started = None, time.perf_counter()
    try:
        with explain_out_of_memory(run), explain_lost_process():
            if prepared.data.eval:
                evaluation, losses = compare_base_and_tuned(
                    prepared, run, model, loss, progress, tuned_nll, base_losses=leg.base_losses
                )
                if leg.on_losses is not None:
                    leg.on_losses(None, losses)
    except KeyboardInterrupt:
        timer.note()
        raise StopRequest().as_error(_UNEVALUATED, run) from None
    if not processes.is_main():
        return RunResult(run=run, evaluation=None)
    seconds = time.perf_counter() - started
    write_card(run)
    # `measured` is what makes a run complete, so everything that must exist is written before it.
    timer.close(evaluate_seconds=seconds, packing=loss.packing)
    report_or_warn(run, progress)
    result = RunResult(run=run, evaluation=evaluation)
    if isinstance(progress, RunLog):
        progress.note(result.verdict)  # the terminal says it below the tables
    return result


def _load(
    prepared: Preparation, run: RunDir, checkpoint: Path | None, progress: Progress, leg: Leg
) -> tuple[PeftModel, SupervisedLoss]:
    """Load the base model, and attach a fresh adapter and the loss."""
    base = (leg.load or load_base)(prepared, progress)
    if checkpoint is None and prepared.model.base.revision and processes.is_main():
        write_lock(prepared, run)  # with the fingerprints of weights that were only now downloaded
    return attach_adapter_and_loss(prepared, base, progress)


def write_lock(prepared: Preparation, run: RunDir, extends: Record | None = None) -> None:
    """Write `lock.json`; `extends` is its record of the run that this one extends (`Lineage`)."""
    written = {"written": settings_as_written(run), "launch": processes.launch_id(), "folder": str(Path.cwd())}
    lineage = {"extends": extends} if extends is not None else {}
    write_record(run.lock, LockRecord, {**prepared.as_lock(), **written, **lineage})


def train_steps(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    checkpoint: Path | None,
    stop: StopRequest,
    progress: Progress,
    leg: Leg = FULL_RUN,
) -> tuple[int, Nll | None]:
    """Take all optimizer steps; return the number of the last one, and its held-out losses if it was evaluated.

    Raises:
        Interrupted: The user stopped it.
        Paused: The leg ends here.
    """
    recipe, total = prepared.recipe, prepared.estimate.num_steps
    done = resume_state(checkpoint) if checkpoint is not None else 0
    torch.manual_seed(recipe.train.seed)
    with progress.task("training", total, "steps") as task, stop_after_step(stop, progress):
        task.advance(done)
        per_epoch = num_steps_per_epoch(prepared.data.num_examples, recipe.train.batch_size)
        callback = RunCallback(run, progress, task, stop, per_epoch)
        callback.branch = branch_step(recipe.train, total)
        callbacks = (*sample_callbacks(prepared, run, model, stop, progress, loss.sharded), *leg.callbacks)
        setup = _trainer_setup(prepared, run, model, loss, stop, progress, callback, callbacks)
        is_fast = recipe.train.engine == "fast"
        trainer = FastTrainer(setup) if is_fast else task_of(recipe).reference_trainer(setup)
        callback.watch(trainer)
        trainer.pause, trainer.dropped = leg.until, leg.dropped
        check_ranks_agree(model)
        over = False
        if checkpoint is not None and (done in (total, leg.until) or recipe.train.early_stopping is not None):
            trainer.restore(checkpoint)
            callback.evaluate_if_owed()
            over = done in (total, leg.until) or trainer.ends_early()
            if over:
                trainer.drop_checkpoint()  # early stopping may end a run where it was paused
        if not over:
            if isinstance(trainer, FastTrainer) and wants_rehearsal(prepared.estimate.memory, recipe.train.device):
                trainer.rehearse()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        check_ranks_agree(model)
        last_step = trainer.state.global_step
        if callback.stopped_at is None and last_step == leg.until and last_step < total:
            _report_losses(trainer, leg)
            raise Paused(f"paused after step {last_step} of {total} (checkpoint saved)")
    if callback.stopped_at is not None:
        raise stop.after(callback.stopped_at, total, run)
    step, losses = trainer.last_evaluation
    if last_step < total:
        progress.line(f"training ended early, after step {last_step} of {total}")
    return last_step, losses if step == last_step else None


def _trainer_setup(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    stop: StopRequest,
    progress: Progress,
    callback: RunCallback,
    more_callbacks: Sequence[TrainerCallback],
) -> TrainerSetup:
    """Return the arguments of the trainer."""
    data = prepared.data
    return TrainerSetup(
        model=model,
        tokenizer=prepared.model.tokenizer,
        train=prepared.recipe.train,
        data=TrainingData(
            train=data.train if data.stream is None else data.stream,
            known=data.train,
            eval=data.eval,
            eval_groups=held_out_groups(data.eval, data.report),
            token_budget=prepared.estimate.memory.token_budget,
            source_of_file=source_of_file(data.report),
        ),
        loss=loss,
        run=run,
        stop=stop,
        progress=progress,
        callback=callback,
        more_callbacks=more_callbacks,
        branch=callback.branch,
    )


def _report_losses(trainer: RunTrainer, leg: Leg) -> None:
    """Hand over the held-out losses at a pause, measured now if the recipe does not evaluate at this step.

    Raises:
        Interrupted: The user stopped it.
    """
    setup, step = trainer.setup, trainer.state.global_step
    evaluated, losses = trainer.last_evaluation
    if leg.on_losses is None:
        return
    if evaluated != step:
        try:
            losses = evaluate_on_all_ranks(
                setup.loss, setup.data.eval, trainer.budget, setup.progress, setup.stop, trainer.events
            )
        except EvaluationStoppedError:
            raise setup.stop.after(step, trainer.state.max_steps, setup.run) from None
    leg.on_losses(step, losses)
