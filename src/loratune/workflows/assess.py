"""Base against tuned on held-out data: losses, answers, and what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel

from loratune.data.examples import LabelledExample
from loratune.data.mixture import held_out_groups
from loratune.data.prompts import stop_token_ids
from loratune.evaluation.generate import Answer, generate_answers
from loratune.evaluation.record import evaluation_record, nll_record
from loratune.evaluation.user_metric import UserMetric
from loratune.model.device import free_memory, is_out_of_memory
from loratune.planning.preparation import Preparation
from loratune.run import processes
from loratune.run.directory import Record, RunDir, write_json
from loratune.run.errors import MachineError
from loratune.run.progress import Progress
from loratune.training.event_log import EventLog, History
from loratune.training.held_out_loss import Nll, evaluate_nll
from loratune.training.loss import SupervisedLoss
from loratune.training.token_budget import TokenBudget
from loratune.workflows.final_adapter import describe_final_adapter
from loratune.workflows.tasks.classification.loss import ClassificationLoss
from loratune.workflows.tasks.classification.measures import class_logits, classification_record, nll_of_labels


def compare_base_and_tuned(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    progress: Progress,
    tuned_nll: Nll | None = None,
    own: UserMetric | None = None,
) -> Record:
    """Base and tuned from the same loaded model, adapter off and on; where processes share it, by all of them in step.

    `tuned_nll`: where it is known already; `own`: in the place of the recipe's metric.
    """
    if isinstance(loss, ClassificationLoss):
        return _compare_classifiers(prepared, run, loss, progress)
    section, data = prepared.recipe.evaluate, prepared.data
    prompts = prepared.data.prompts
    events = EventLog(run, progress)
    events.step = max((line["step"] for line in run.read_metrics()), default=prepared.estimate.num_steps)
    budget = TokenBudget(processes.gather(_token_budget(prepared, run))[0], events, together=loss.sharded)
    stops = stop_token_ids(prepared.model.tokenizer) if prompts else ()

    def told(message: str) -> None:
        if loss.sharded:
            raise MachineError(
                f"process {processes.rank()}: {message}, which processes that share the base cannot do alone",
                fix="a smaller evaluate.max_new_tokens, or evaluate.metric=none",
            )
        events.emit("smaller_answer_batches", message)

    def measure(name: str, known: Nll | None = None) -> tuple[Nll, Nll, list[Answer]]:
        nll = known or evaluate_nll(loss, data.eval, budget, progress)
        other = evaluate_nll(loss, prepared.data.forgetting, budget, progress) if prepared.data.forgetting else []
        if not prompts:
            return nll, other, []
        with progress.task(f"{name} answers", len(prompts), "prompts") as task:
            answers = generate_answers(
                model,
                prepared.model.tokenizer,
                prompts,
                max_new_tokens=section.max_new_tokens,
                stop_token_ids=stops,
                token_limit=prepared.estimate.memory.generation_tokens,
                progress=task.advance,
                warn=told,
            )
        return nll, other, answers

    model.eval()
    free_memory()
    with model.disable_adapter():
        base_nll, base_other, base_answers = measure("base")
    tuned_nll, tuned_other, tuned_answers = measure("tuned", tuned_nll)
    record = evaluation_record(
        metric=own.name if own else section.metric,
        prompts=prompts,
        base_answers=base_answers,
        tuned_answers=tuned_answers,
        base_nll=base_nll,
        tuned_nll=tuned_nll,
        scorer=own,
    )
    if prepared.data.forgetting:
        record["forgetting"] = nll_record(base_other, tuned_other)
        rise = record["forgetting"]["difference"]["nll"]
        if rise["low"] > 0:
            progress.warn(f"the loss on evaluate.forgetting rose by {rise['value']:.4g} nats per token: it forgets")
    groups = held_out_groups(data.eval, data.report)
    if groups:
        record["sources"] = {
            name: nll_record([base_nll[i] for i in chosen], [tuned_nll[i] for i in chosen])
            for name, chosen in groups.items()
        }
    record["adapter"] = describe_final_adapter(prepared, run)
    if processes.is_main():
        write_json(run.evaluation, record)
    return record


def _compare_classifiers(prepared: Preparation, run: RunDir, loss: ClassificationLoss, progress: Progress) -> Record:
    """The same of a classifier: the base has the head that training began with."""
    events = EventLog(run, progress)
    events.step = prepared.estimate.num_steps
    budget = TokenBudget(_token_budget(prepared, run), events)
    held_out = [example for example in prepared.data.eval if isinstance(example, LabelledExample)]
    loss.model.eval()
    free_memory()
    with loss.model.disable_adapter():
        base = class_logits(loss, held_out, budget, progress)
    tuned = class_logits(loss, held_out, budget, progress)
    counts = prepared.data.report["train"]["labels"]
    record = classification_record(
        names=prepared.data.report["labels"],
        examples=held_out,
        base=base,
        tuned=tuned,
        majority=max(counts, key=lambda name: counts[name]),
    )
    groups = held_out_groups(held_out, prepared.data.report)
    if groups:
        sides = [nll_of_labels(logits, held_out) for logits in (base, tuned)]
        record["sources"] = {
            name: nll_record(*([side[i] for i in chosen] for side in sides)) for name, chosen in groups.items()
        }
    record["adapter"] = describe_final_adapter(prepared, run)
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
