"""Base vs. fine-tuned for a model that writes text: losses, answers, and what was forgotten."""

from __future__ import annotations

from loratune.data.prompts import stop_token_ids
from loratune.evaluation.generate import Answer, generate_answers
from loratune.evaluation.record import evaluation_record, nll_record
from loratune.model.device import free_memory
from loratune.run import processes
from loratune.run.errors import MachineError
from loratune.training.held_out_loss import Nll, evaluate_nll
from loratune.workflows.tasks.task import Compared, Comparison


def compare_answers(comparison: Comparison) -> Compared:
    """Measure losses and answers of the same loaded model as it began and as it is.

    Processes that share the base model do this in step.
    """
    data, model = comparison.prepared.data, comparison.model
    metric = comparison.metric
    model.eval()
    free_memory()
    with comparison.before():
        base_nll, base_other, base_answers = _measure(
            comparison, "initial" if comparison.started else "base", comparison.base_nll
        )
    tuned_nll, tuned_other, tuned_answers = _measure(comparison, "tuned", comparison.tuned_nll)
    record = evaluation_record(
        metric=metric.name if metric else comparison.prepared.recipe.evaluate.metric,
        prompts=data.prompts,
        base_answers=base_answers,
        tuned_answers=tuned_answers,
        base_nll=base_nll,
        tuned_nll=tuned_nll,
        scorer=metric,
    )
    if data.forgetting:
        record["forgetting"] = nll_record(base_other, tuned_other)
        rise = record["forgetting"]["difference"]["nll"]
        if rise["low"] > 0:
            comparison.progress.warn(
                f"the loss on evaluate.forgetting rose by {rise['value']:.4g} nats per token: it forgets"
            )
    return Compared(record=record, base_nll=base_nll, tuned_nll=tuned_nll)


def _measure(comparison: Comparison, name: str, known: Nll | None = None) -> tuple[Nll, Nll, list[Answer]]:
    """Return losses on held-out data, losses on `evaluate.forgetting`, and answers."""
    prepared, loss, budget = comparison.prepared, comparison.loss, comparison.budget
    data, progress = prepared.data, comparison.progress
    nll = known or evaluate_nll(loss, data.eval, budget, progress)
    other = evaluate_nll(loss, data.forgetting, budget, progress) if data.forgetting else []
    if not data.prompts:
        return nll, other, []

    def report_smaller_batches(message: str) -> None:
        if loss.sharded:
            raise MachineError(
                f"process {processes.rank()}: {message}, which processes that share the base cannot do alone",
                fix="a smaller evaluate.max_new_tokens, or evaluate.samples=0",
            )
        comparison.events.emit("smaller_answer_batches", message)

    with progress.task(f"{name} answers", len(data.prompts), "prompts") as task:
        answers = generate_answers(
            comparison.model,
            prepared.model.tokenizer,
            data.prompts,
            max_new_tokens=prepared.recipe.evaluate.max_new_tokens,
            stop_token_ids=stop_token_ids(prepared.model.tokenizer),
            token_limit=prepared.estimate.memory.generation_tokens,
            progress=task.advance,
            warn=report_smaller_batches,
        )
    return nll, other, answers
