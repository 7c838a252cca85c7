"""The held-out loss: token-weighted, exact whatever the micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loratune.data.batch import collate, num_supervised
from loratune.data.render import Example
from loratune.progress import Progress, Silent
from loratune.training.budget import TokenBudget
from loratune.training.loss import SupervisedLoss

Nll = list[tuple[float, int]]
"""Per held-out example: the sum of -log p over its supervised tokens, in nats, and their number."""

_NOBODY = Silent()


class EvaluationStoppedError(Exception):
    """The user wants to stop, and did not want to wait for the end of an evaluation."""


def evaluate_nll(
    loss: SupervisedLoss,
    examples: Sequence[Example],
    budget: TokenBudget,
    progress: Progress,
    stop: Callable[[], object] = bool,
) -> Nll:
    """For each example the sum of -log p over its supervised tokens, in nats, and their number.

    Args:
        loss: Of the model.
        examples: To measure.
        budget: Of a micro-batch; halved where memory runs out.
        progress: Who is told how it goes.
        stop: Asked between micro-batches whether to give up.

    Raises:
        EvaluationStoppedError: `stop` said so.
        MachineError: One example does not fit into memory.
    """
    was_training = loss.model.training
    loss.model.eval()
    try:
        return budget.retry(lambda: _measure(loss, examples, budget, progress, stop), undo=lambda: None)
    finally:
        loss.model.train(was_training)


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
            batch = collate([examples[i] for i in chosen]).to(loss.model.device)
            counts = [num_supervised(examples[i]) for i in chosen]
            sums = [float(part.double().sum()) for part in torch.split(loss.per_token(batch), counts)]
            for i, total, count in zip(chosen, sums, counts, strict=True):
                results[i] = (total, count)
            task.advance(len(chosen))
    return results


def loss_of_each(loss: SupervisedLoss, examples: Sequence[Example]) -> list[float]:
    """The mean loss of each example, computed by itself, without dropout."""
    was_training = loss.model.training
    loss.model.eval()
    try:
        return [
            float(loss.per_token(collate([example]).to(loss.model.device)).double().mean())
            if num_supervised(example)
            else 0.0
            for example in examples
        ]
    finally:
        loss.model.train(was_training)
