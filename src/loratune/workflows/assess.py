"""Compare the fine-tuned model with the one before the run on held-out data."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from loratune.data.mixture import held_out_groups
from loratune.evaluation.record import nll_record
from loratune.model.adapter.start_from import adapter_fingerprint
from loratune.model.device import is_out_of_memory
from loratune.planning.lock import examples_fingerprint
from loratune.run import processes
from loratune.run.errors import OutOfMemory
from loratune.run.records.evaluation import EvaluationRecord
from loratune.run.records.files import write_record
from loratune.training.event_log import EventLog, History
from loratune.training.token_budget import TokenBudget
from loratune.workflows.before_training import before_training, started_from_adapter
from loratune.workflows.final_adapter import describe_final_adapter
from loratune.workflows.tasks.task import Comparison, task_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel

    from loratune.evaluation.user_metric import UserMetric
    from loratune.planning.preparation import Preparation
    from loratune.run.directory import Record, RunDir
    from loratune.run.progress import Progress
    from loratune.training.held_out_loss import Nll
    from loratune.training.loss import SupervisedLoss


def compare_base_and_tuned(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    progress: Progress,
    tuned_nll: Nll | None = None,
    metric: UserMetric | None = None,
    base_losses: dict[str, Nll] | None = None,
) -> tuple[Record, Nll]:
    """Measure the fine-tuned model and the one before the run, which are the same loaded model with another adapter or
    none, and write `evaluation.json`; return it, and the held-out losses of the fine-tuned model.

    Args:
        prepared: The prepared run.
        run: Its directory.
        model: The base model with the adapter.
        loss: The model's loss.
        progress: Shows how far the evaluation is.
        tuned_nll: The fine-tuned model's held-out losses, if training ended with them.
        metric: A metric of the user's, instead of the recipe's.
        base_losses: `Leg.base_losses`.
    """
    events = EventLog(run, progress)
    events.step = max((line["step"] for line in run.read_metrics()), default=prepared.estimate.num_steps)
    started = started_from_adapter(run, progress)
    budget = TokenBudget(processes.gather(_token_budget(prepared, run))[0], events, together=loss.sharded)
    known = {} if base_losses is None else base_losses
    key = _key_before(prepared, run, loss, budget, started)
    compared = task_of(prepared.recipe).compare(
        Comparison(
            prepared=prepared,
            model=model,
            started=started,
            before=partial(before_training, model, run, started=started),
            loss=loss,
            budget=budget,
            events=events,
            progress=progress,
            run=run,
            base_nll=known.get(key),
            tuned_nll=tuned_nll,
            metric=metric,
        )
    )
    if key == _key_before(prepared, run, loss, budget, started):  # memory may have run out on the way
        known[key] = compared.base_nll
    record = compared.record
    record["before"] = "start" if started else "base"
    groups = held_out_groups(prepared.data.eval, prepared.data.report)
    if groups:
        record["sources"] = {
            name: nll_record([compared.base_nll[i] for i in counted], [compared.tuned_nll[i] for i in counted])
            for name, chosen in groups.items()
            if (counted := [i for i in chosen if compared.base_nll[i][1]])  # a bad answer has no loss to compare
        }
    record["adapter"] = describe_final_adapter(prepared, run)
    if processes.is_main():
        record = write_record(run.evaluation, EvaluationRecord, record)
    return record, compared.tuned_nll


@contextmanager
def explain_out_of_memory(run: RunDir) -> Iterator[None]:
    """Turn running out of memory, where nothing can be made smaller, into an error that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory: {error}",
            file=run.root,
            fix="close other programs and try again (`loratune resume` if it was training)",
        ) from error


def _token_budget(prepared: Preparation, run: RunDir) -> int:
    """Return the plan's token budget, or what an out-of-memory error reduced it to."""
    return History.of(run.read_metrics()).token_budget or prepared.estimate.memory.token_budget


def _key_before(prepared: Preparation, run: RunDir, loss: SupervisedLoss, budget: TokenBudget, started: bool) -> str:
    """Return what decides, to the bit, the held-out losses before the first step: everything in the recipe but what is
    left out here, the adapter that the run starts from, and how examples share a forward.
    """
    recipe = prepared.recipe.model_dump(mode="json", exclude={"train": {"learning_rate", "output_dir"}})
    start = adapter_fingerprint(run.start) if started else None
    forward = [loss.packed, loss.longest_packed, loss.pads, loss.shares_prefixes, budget.tokens]
    return json.dumps([recipe, examples_fingerprint(prepared.data.eval), start, forward])
