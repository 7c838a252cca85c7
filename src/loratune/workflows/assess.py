"""Base against tuned on held-out data: losses, answers, and what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel

from loratune.data.mixture import held_out_groups
from loratune.evaluation.record import nll_record
from loratune.evaluation.user_metric import UserMetric
from loratune.model.device import is_out_of_memory
from loratune.planning.preparation import Preparation
from loratune.run import processes
from loratune.run.directory import Record, RunDir, write_json
from loratune.run.errors import MachineError
from loratune.run.progress import Progress
from loratune.training.event_log import EventLog, History
from loratune.training.held_out_loss import Nll
from loratune.training.loss import SupervisedLoss
from loratune.training.token_budget import TokenBudget
from loratune.workflows.final_adapter import describe_final_adapter
from loratune.workflows.tasks.task import Comparison, task_of


def compare_base_and_tuned(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    progress: Progress,
    tuned_nll: Nll | None = None,
    metric: UserMetric | None = None,
) -> Record:
    """Measure base and fine-tuned model, which are the same loaded model with the adapter off and on, and write `evaluation.json`.

    Args:
        prepared: The prepared run.
        run: Its directory.
        model: The base model with the adapter.
        loss: The model's loss.
        progress: Shows how far the evaluation is.
        tuned_nll: The fine-tuned model's held-out losses, if training ended with them.
        metric: A metric of the user's, instead of the recipe's.
    """
    events = EventLog(run, progress)
    events.step = max((line["step"] for line in run.read_metrics()), default=prepared.estimate.num_steps)
    compared = task_of(prepared.recipe).compare(
        Comparison(
            prepared=prepared,
            model=model,
            loss=loss,
            budget=TokenBudget(processes.gather(_token_budget(prepared, run))[0], events, together=loss.sharded),
            events=events,
            progress=progress,
            tuned_nll=tuned_nll,
            metric=metric,
        )
    )
    record = compared.record
    groups = held_out_groups(prepared.data.eval, prepared.data.report)
    if groups:
        record["sources"] = {
            name: nll_record([compared.base_nll[i] for i in chosen], [compared.tuned_nll[i] for i in chosen])
            for name, chosen in groups.items()
        }
    record["adapter"] = describe_final_adapter(prepared, run)
    if processes.is_main():
        write_json(run.evaluation, record)
    return record


@contextmanager
def explain_out_of_memory(run: RunDir) -> Iterator[None]:
    """Memory that runs out where nothing can be made smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            f"out of memory: {error}",
            file=run.root,
            fix="end other programs, then start it again: `loratune resume`, or what you did",
        ) from error


def _token_budget(prepared: Preparation, run: RunDir) -> int:
    """The plan's, or what an out-of-memory error left of it."""
    return History.of(run.read_metrics()).token_budget or prepared.estimate.memory.token_budget
