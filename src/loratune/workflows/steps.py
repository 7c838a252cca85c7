"""The spine of a run, from the weights to the report; `train` and `resume` differ only in where they enter it.

    load base → attach adapter and loss → train_steps → final adapter saved → base vs. fine-tuned → model card → report

Every rank goes this way up to the last step. Then rank 0 saves and evaluates alone, unless the ranks share the base
model (`training.fsdp`): they evaluate in step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

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
from loratune.training.callbacks import RunCallback
from loratune.training.checkpoint import resume_state
from loratune.training.fast_trainer import FastTrainer
from loratune.training.fsdp import explain_lost_process
from loratune.training.gradient_sync import check_ranks_agree
from loratune.training.hf_arguments import TrainingData
from loratune.training.signals import StopRequest, stop_after_step
from loratune.training.trainer import TrainerSetup
from loratune.workflows.assess import compare_base_and_tuned, explain_out_of_memory
from loratune.workflows.final_adapter import save_final, select_final_adapter
from loratune.workflows.load import attach_adapter_and_loss, load_base, load_trained
from loratune.workflows.measured import RunTimer
from loratune.workflows.result import RunResult
from loratune.workflows.tasks.task import Started, task_of

if TYPE_CHECKING:
    from peft import PeftModel

    from loratune.planning.preparation import Preparation
    from loratune.run.progress import Progress
    from loratune.training.held_out_loss import Nll
    from loratune.training.loss import SupervisedLoss

_UNEVALUATED = "stopped before the evaluation; all steps are done, and the adapter is saved"


def settings_as_written(run: RunDir) -> Record:
    """Return the settings of RUN/recipe.yaml with `auto` unresolved."""
    return Recipe.load(run.recipe).model_dump(mode="json")


def run_from_weights(prepared: Preparation, run: RunDir, checkpoint: Path | None, progress: Progress) -> RunResult:
    """Train from the loaded weights on, evaluate, and write everything that follows.

    Args:
        prepared: The prepared run.
        run: Its directory.
        checkpoint: The checkpoint to resume from; None for the first step.
        progress: Shows how far the run is.
    """
    timer = RunTimer(run, prepared.recipe.train.device)
    model, loss = _load(prepared, run, checkpoint, progress)
    prepared = task_of(prepared.recipe).before_training(
        Started(prepared=prepared, run=run, model=model, loss=loss, progress=progress)
    )
    stop = StopRequest()
    try:
        with explain_out_of_memory(run), explain_lost_process():
            last_step, tuned_nll = train_steps(prepared, run, model, loss, checkpoint, stop, progress)
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
        model, loss = load_trained(prepared, run, progress)
        tuned_nll = None
    return _finish(prepared, run, model, loss, timer, progress, tuned_nll)


def finish_trained_run(prepared: Preparation, run: RunDir, progress: Progress) -> RunResult:
    """Evaluate a run whose adapter is saved, or only write its report if that is done too."""
    timer = RunTimer(run, prepared.recipe.train.device)
    if "measured" in read_json(run.plan):
        if processes.is_main():
            report_or_warn(run, progress)
        return RunResult(run=run, evaluation=read_json(run.evaluation) if prepared.data.eval else None)
    model, loss = load_trained(prepared, run, progress)
    return _finish(prepared, run, model, loss, timer, progress)


def _finish(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    timer: RunTimer,
    progress: Progress,
    tuned_nll: Nll | None = None,
) -> RunResult:
    """Evaluate, and write model card, measurements and report."""
    evaluation, started = None, time.perf_counter()
    try:
        with explain_out_of_memory(run), explain_lost_process():
            if prepared.data.eval:
                evaluation = compare_base_and_tuned(prepared, run, model, loss, progress, tuned_nll)
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
    return RunResult(run=run, evaluation=evaluation)


def _load(
    prepared: Preparation, run: RunDir, checkpoint: Path | None, progress: Progress
) -> tuple[PeftModel, SupervisedLoss]:
    """Load the base model, and attach a fresh adapter and the loss."""
    base = load_base(prepared, progress)
    if checkpoint is None and prepared.model.base.revision and processes.is_main():
        write_lock(prepared, run)  # with the fingerprints of weights that were only now downloaded
    return attach_adapter_and_loss(prepared, base, progress)


def write_lock(prepared: Preparation, run: RunDir) -> None:
    """Write `lock.json`."""
    written = {"written": settings_as_written(run), "launch": processes.launch_id(), "folder": str(Path.cwd())}
    write_record(run.lock, LockRecord, {**prepared.as_lock(), **written})


def train_steps(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    checkpoint: Path | None,
    stop: StopRequest,
    progress: Progress,
) -> tuple[int, Nll | None]:
    """Take all optimizer steps; return the number of the last one, and its held-out losses if it was evaluated.

    Raises:
        Interrupted: The user stopped it.
    """
    recipe, data = prepared.recipe, prepared.data
    done = resume_state(checkpoint) if checkpoint is not None else 0
    torch.manual_seed(recipe.train.seed)
    with progress.task("training", prepared.estimate.num_steps, "steps") as task, stop_after_step(stop, progress):
        task.advance(done)
        callback = RunCallback(
            run, progress, task, stop, num_steps_per_epoch(data.num_examples, recipe.train.batch_size)
        )
        setup = TrainerSetup(
            model=model,
            tokenizer=prepared.model.tokenizer,
            train=recipe.train,
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
        )
        is_fast = recipe.train.engine == "fast"
        trainer = FastTrainer(setup) if is_fast else task_of(recipe).reference_trainer(setup)
        callback.watch(trainer)
        check_ranks_agree(model)
        over = False
        if checkpoint is not None and (done == prepared.estimate.num_steps or recipe.train.early_stopping is not None):
            trainer.restore(checkpoint)
            callback.evaluate_if_owed()
            over = done == prepared.estimate.num_steps or trainer.ends_early()
        if not over:
            if isinstance(trainer, FastTrainer) and wants_rehearsal(prepared.estimate.memory, recipe.train.device):
                trainer.rehearse()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        check_ranks_agree(model)
    if callback.stopped_at is not None:
        raise stop.after(callback.stopped_at, prepared.estimate.num_steps, run)
    last_step, (step, losses) = trainer.state.global_step, trainer.last_evaluation
    if last_step < prepared.estimate.num_steps:
        progress.line(f"training ended early, after step {last_step} of {prepared.estimate.num_steps}")
    return last_step, losses if step == last_step else None
