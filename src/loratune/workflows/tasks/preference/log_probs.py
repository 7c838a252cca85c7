"""log p of whole answers under a model as it is now: for the reference, the baseline of KTO, and the measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from loratune.data.batch import FILLER
from loratune.data.examples import AnswersExample
from loratune.run import processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.run.progress import Progress
    from loratune.training.token_budget import TokenBudget
    from loratune.workflows.tasks.preference.loss import PreferenceLoss

LogProbs = npt.NDArray[np.float64]
"""[n, A]: log p of the answers of each example, in nats: of the chosen and the rejected one of a pair, else of one."""


def answers_of(examples: Sequence[Any]) -> list[Any]:
    """Return the examples, which are pairs or judged answers."""
    assert all(isinstance(example, AnswersExample) for example in examples), "not the examples of a preference run"
    return list(examples)


def log_probs(
    loss: PreferenceLoss, examples: Sequence[AnswersExample], budget: TokenBudget, progress: Progress, what: str
) -> LogProbs:
    """Return log p of the answers of each example under the model as it is now, without dropout.

    Every process computes a share, and all get all of them.

    Args:
        loss: The loss of the model.
        examples: Pairs, or judged answers.
        budget: Tokens of a micro-batch; halved when memory runs out.
        progress: Shows how far it is.
        what: Whose log-probabilities these are, for the progress bar.

    Raises:
        MachineError: One example does not fit into memory.
    """
    by_length = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    mine = by_length[processes.rank() :: processes.size()]
    was_training = loss.model.training
    loss.model.eval()

    def measure() -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        with progress.task(f"{what} log-probabilities", len(mine), "examples") as task, torch.no_grad():
            for chosen in budget.micro_batches(examples, mine):
                batch = loss.micro_batch([examples[i] for i in chosen] or [FILLER])
                if chosen:
                    found |= dict(zip(chosen, loss.answers(batch).logps_PA.tolist(), strict=True))
                else:
                    loss.per_token(batch)  # the ranks that share the base call it equally often
                task.advance(len(chosen))
        return found

    try:
        found = budget.retry(measure, undo=lambda: None)
    finally:
        loss.model.train(was_training)
    merged = {i: values for part in processes.gather(found) for i, values in part.items()}
    return np.array([merged[i] for i in range(len(examples))], dtype=np.float64).reshape(-1, loss.num_answers)
