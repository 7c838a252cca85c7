"""What the processes of a run exchange at a step: its size before, the sum of their gradients after.

Each process has a share of the step's examples, and divides its losses by the supervised tokens of the whole step. So the sum of
the gradients is that of one process with all examples, and every process takes the same step, to the bit. There are no hooks
that send gradients while others are computed: an adapter has a thousandth of the model's weights, and is sent at once.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel

from loratune.data.batch import num_supervised
from loratune.data.rows.conversation import Rejected
from loratune.run import processes
from loratune.run.errors import RunError
from loratune.training.event_log import EventLog
from loratune.training.loss_by_source import PerSourceLoss
from loratune.training.signals import StopRequest
from loratune.training.step_dataset import StepExamples


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Of a step, over all processes.

    Attributes:
        num_tokens: Of its examples.
        num_supervised_tokens: Of them.
        by_source: Supervised tokens of each source.
        left_out: Rows of streamed data that turned out to be no examples.
    """

    num_tokens: int
    num_supervised_tokens: int
    by_source: Sequence[int]
    left_out: Sequence[Rejected]

    @classmethod
    def over_all(cls, share: StepExamples, sources: PerSourceLoss, events: EventLog) -> StepTotals:
        """What the shares come to; the events that other processes had are told on the way."""
        num_tokens = sum(len(example.input_ids) for example in share.examples)
        num_supervised_tokens = sum(map(num_supervised, share.examples))
        by_source = sources.count(share.examples)
        shares = processes.gather((num_tokens, num_supervised_tokens, by_source, share.left_out, events.drain()))
        events.replay(record for *_, untold in shares for record in untold)
        return cls(
            num_tokens=sum(tokens for tokens, *_ in shares),
            num_supervised_tokens=sum(tokens for _, tokens, *_ in shares),
            by_source=[sum(counts) for counts in zip(*(counts for _, _, counts, *_ in shares), strict=True)],
            left_out=[row for *_, rows, _ in shares for row in rows],
        )


def all_reduce_gradients(model: PeftModel, losses: torch.Tensor, stop: StopRequest) -> torch.Tensor:
    """Replace the gradients by their sum over all processes, in one message; a process without examples adds nothing.

    Args:
        model: The adapted model.
        losses: Of this process's share of the step, one or more of them, [L].
        stop: Whether this process was asked to stop; afterwards, whether any was.

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
    if num_trained:  # a step without any example changes nothing; with gradients of zero AdamW would
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.view_as(weight).to(weight.dtype)
    stop.agree([signal.SIGINT if num_int else 0, signal.SIGTERM if num_term else 0])
    return total


def seed_step(seed: int, step: int) -> None:
    """Of several processes, let each draw other dropout masks, that depend on the step and nothing before it: a run that
    goes on needs no random states of theirs."""
    if processes.size() > 1:
        (drawn,) = np.random.SeedSequence([seed, step, processes.rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn))


def check_ranks_agree(model: PeftModel) -> None:
    """Whether all processes have the same adapter, which they train each for itself.

    Raises:
        RunError: They do not.
    """
    if processes.size() == 1:
        return
    sums = [float(weight.detach().double().sum()) for weight in model.parameters() if weight.requires_grad]
    others = [rank for rank, theirs in enumerate(processes.gather(sums)) if theirs != sums]
    if others:
        raise RunError(
            f"process {processes.rank()} has another adapter than process {others[0]}: they computed different steps",
            fix="the same versions and kind of device for all processes",
        )
