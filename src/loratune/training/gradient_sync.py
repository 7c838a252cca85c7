"""What the ranks of a run exchange in a step: first its number of tokens, at the end the sum of their gradients.

Each rank has a share of the step's examples, and divides its losses by the supervised tokens of the whole step. So the
sum of the gradients equals that of one process with all examples, and every rank takes bit-for-bit the same step.
Gradients are not sent while others are still computed, as DDP does: an adapter has about a thousandth of the model's
weights, so one message at the end costs little.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from loratune.data.batch import num_supervised, num_terms
from loratune.run import processes
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from loratune.data.rows.row import Rejected
    from loratune.training.event_log import EventLog
    from loratune.training.loss_by_source import PerSourceLoss
    from loratune.training.signals import StopRequest
    from loratune.training.step_dataset import StepExamples


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Totals of a step over all ranks.

    Attributes:
        num_tokens: Tokens of the step's examples.
        num_supervised_tokens: Supervised tokens among them.
        num_terms: Terms of the step's loss, which is their mean: supervised tokens, or pairs of answers.
        by_source: Terms of each data source.
        left_out: Rows of streamed data that cannot be trained on.
    """

    num_tokens: int
    num_supervised_tokens: int
    num_terms: int
    by_source: Sequence[int]
    left_out: Sequence[Rejected]

    @classmethod
    def over_all(cls, share: StepExamples, sources: PerSourceLoss, events: EventLog) -> StepTotals:
        """Add up the shares of all ranks; the same message carries the events of the other ranks, reported here."""
        num_tokens = sum(len(example.input_ids) for example in share.examples)
        num_supervised_tokens = sum(map(num_supervised, share.examples))
        counts = (num_tokens, num_supervised_tokens, sum(map(num_terms, share.examples)))
        shares = processes.gather((counts, sources.count(share.examples), share.left_out, events.drain()))
        events.replay(record for *_, pending in shares for record in pending)
        num_tokens, num_supervised_tokens, terms = (
            sum(part) for part in zip(*(own for own, *_ in shares), strict=True)
        )
        return cls(
            num_tokens=num_tokens,
            num_supervised_tokens=num_supervised_tokens,
            num_terms=terms,
            by_source=[sum(part) for part in zip(*(own for _, own, *_ in shares), strict=True)],
            left_out=[row for *_, rows, _ in shares for row in rows],
        )


def all_reduce_gradients(model: PeftModel, losses: torch.Tensor, stop: StopRequest) -> torch.Tensor:
    """Replace the gradients by their sum over all ranks, in one message; a rank without examples adds nothing.

    Args:
        model: The adapted model.
        losses: Losses of this rank's share of the step, [L].
        stop: The request to stop of this rank; afterwards set on every rank if any was asked.

    Returns:
        The losses of the whole step, [L].
    """
    if processes.size() == 1:
        return losses
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    flags = [stop.asked == signal.SIGINT, stop.asked == signal.SIGTERM, any(w.grad is not None for w in weights)]
    bucket = torch.cat(
        [
            *((torch.zeros_like(w) if w.grad is None else w.grad).detach().flatten().float() for w in weights),
            losses.detach().float(),
            torch.tensor(flags, dtype=torch.float32, device=losses.device),
        ]
    )
    processes.all_reduce_sum(bucket)
    *gradients, total, sums = torch.split(bucket, [*(w.numel() for w in weights), len(losses), len(flags)])
    num_int, num_term, num_trained = sums.tolist()
    if num_trained:  # a step without examples must change nothing: with gradients of zero, AdamW would still decay
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.view_as(weight).to(weight.dtype)
    stop.agree([signal.SIGINT if num_int else 0, signal.SIGTERM if num_term else 0])
    return total


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators from (seed, step, rank), for models that have dropout of their own.

    So resuming needs no saved random state. The adapter's dropout and NEFTune's noise use no generator.
    """
    (drawn,) = np.random.SeedSequence([seed, step, processes.rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn))


def check_ranks_agree(model: PeftModel) -> None:
    """Check that all ranks have the same adapter, of which each trains its own copy.

    Raises:
        RunError: They do not.
    """
    if processes.size() == 1:
        return
    sums = [float(weight.detach().double().sum()) for weight in model.parameters() if weight.requires_grad]
    others = [rank for rank, theirs in enumerate(processes.gather(sums)) if theirs != sums]
    if others:
        raise RunError(
            f"process {processes.rank()} has a different adapter from process {others[0]}: their steps differed",
            fix="use the same package versions and the same kind of device for all processes",
        )
