"""The held-out loss: an average over tokens, independent of how the examples are split into micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loratune.data.batch import FILLER, collate, num_terms
from loratune.run import processes
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from loratune.data.examples import Example
    from loratune.run.progress import Progress
    from loratune.training.event_log import EventLog
    from loratune.training.loss import SupervisedLoss
    from loratune.training.signals import StopRequest
    from loratune.training.token_budget import TokenBudget

Nll = list[tuple[float, int]]
"""For each held-out example: the sum of -log p over its supervised tokens, in nats, and their number; of a pair of
answers its loss, and 1."""


def mean_nll(losses: Iterable[tuple[float, int]]) -> float:
    """Return the mean of -log p over all supervised tokens of these examples, in nats."""
    pairs = list(losses)
    return sum(total for total, _ in pairs) / max(1, sum(count for _, count in pairs))


class EvaluationStoppedError(Exception):
    """The user stopped the run during an evaluation."""


def evaluate_nll(
    loss: SupervisedLoss,
    examples: Sequence[Example],
    budget: TokenBudget,
    progress: Progress,
    stop: Callable[[], object] = bool,
) -> Nll:
    """Measure each example: the sum of -log p over its supervised tokens, in nats, and their number.

    Args:
        loss: The loss of the model.
        examples: The examples to measure.
        budget: Tokens of a micro-batch; halved when memory runs out.
        progress: Shows the progress bar.
        stop: Called between micro-batches; a true value ends the evaluation.

    Raises:
        EvaluationStoppedError: `stop` returned a true value.
        MachineError: One example does not fit into memory.
    """
    was_training = loss.model.training
    loss.model.eval()
    try:
        return budget.retry(lambda: _measure(loss, examples, budget, progress, stop), undo=lambda: None)
    finally:
        loss.model.train(was_training)


def evaluate_on_all_ranks(
    loss: SupervisedLoss,
    examples: Sequence[Example],
    budget: TokenBudget,
    progress: Progress,
    stop: StopRequest,
    events: EventLog,
) -> Nll:
    """Run `evaluate_nll` on a share of the examples per rank: all ranks get all losses, or all fail, or all stop.

    Raises:
        EvaluationStoppedError: A rank was asked to stop.
        RunError: The evaluation failed on another rank.
        LostPeerError: Another rank is gone.
    """
    if processes.size() == 1:
        return evaluate_nll(loss, examples, budget, progress, lambda: stop)
    by_length = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    mine = by_length[processes.rank() :: processes.size()]  # by length, so that shares cost about the same
    found: dict[int, tuple[float, int]] = {}
    problem = ""
    try:
        asked = bool if loss.sharded else lambda: stop.asked
        losses = evaluate_nll(loss, [examples[i] for i in mine], budget, progress, asked)
        found = dict(zip(mine, losses, strict=True))
    except EvaluationStoppedError:
        pass
    except Exception as error:  # whatever it was: the other ranks wait for this share and must learn that it failed
        if loss.sharded:
            raise  # the others wait for a layer, and will notice that this rank is gone
        problem = f"process {processes.rank()}: {type(error).__name__}: {error}"
    parts = processes.gather((found, problem, stop.asked or 0, events.drain()))
    events.replay(record for *_, pending in parts for record in pending)
    stop.agree(asked for _, _, asked, _ in parts)
    if stop:
        raise EvaluationStoppedError
    for _, problem, _, _ in parts:
        if problem:
            raise RunError(problem)
    merged = {i: pair for part, *_ in parts for i, pair in part.items()}
    return [merged[i] for i in range(len(examples))]


def _measure(
    loss: SupervisedLoss,
    examples: Sequence[Example],
    budget: TokenBudget,
    progress: Progress,
    stop: Callable[[], object],
) -> Nll:
    results: Nll = [(0.0, 0)] * len(examples)
    with progress.task("held-out loss", len(examples), "examples") as task:
        for chosen in budget.micro_batches(examples, range(len(examples))):
            if stop():
                raise EvaluationStoppedError
            batch = loss.micro_batch([examples[i] for i in chosen] or [FILLER])
            counts = [num_terms(examples[i]) for i in chosen]
            losses = loss.per_token(batch)
            sums = [float(part.double().sum()) for part in torch.split(losses, counts)] if chosen else []
            for i, total, count in zip(chosen, sums, counts, strict=True):
                results[i] = (total, count)
            task.advance(len(chosen))
    return results


def loss_of_each(loss: SupervisedLoss, examples: Sequence[Example]) -> list[float]:
    """Return the mean loss of each example, computed alone and without dropout; 0 without supervised tokens."""
    was_training = loss.model.training
    loss.model.eval()
    num_calls = max(processes.gather(len(examples))) if loss.sharded else len(examples)
    try:
        means = [
            float(loss.per_token(collate([example]).to(loss.model.device)).double().mean())
            for example in [*examples, *[FILLER] * (num_calls - len(examples))]
        ]
    finally:
        loss.model.train(was_training)
    return [mean if num_terms(example) else 0.0 for example, mean in zip(examples, means, strict=False)]
