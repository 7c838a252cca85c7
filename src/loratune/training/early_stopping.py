"""Early stopping: end a run after `patience` evaluations without a new lowest held-out loss.

The decision depends on the held-out losses alone, which are in `metrics.jsonl` and known to all ranks. So a resumed run
stops where the uninterrupted one would have, and all ranks stop at the same step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratune.recipe.recipe import TrainSection
    from loratune.training.event_log import EventLog, History

EVENT = "early_stopping"


def evaluations_without_improvement(held_out: Mapping[int, float | None]) -> int:
    """Count the evaluations since the one with the lowest held-out loss, the earliest of equals.

    This is what transformers' `EarlyStoppingCallback` counts with a threshold of 0. A failed evaluation does not count;
    a loss of NaN counts as not lower.

    Args:
        held_out: Step → held-out loss, None where the evaluation failed.
    """
    lowest, since = math.inf, 0
    for step in sorted(held_out):
        loss = held_out[step]
        if loss is None:
            continue
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
    return since


class Patience:
    """Decides whether a run ends before its last step.

    Args:
        train: The recipe's section; `early_stopping` is the patience in evaluations, None for no early stopping.
        events: Where the end is recorded.
        history: What is known of the steps before a resume.
    """

    def __init__(self, train: TrainSection, events: EventLog, history: History) -> None:
        self._patience, self._events, self._recorded = train.early_stopping, events, history.stopped_early

    def is_over(self, held_out: Mapping[int, float | None]) -> bool:
        """Tell whether the patience is used up; record the event the first time."""
        if self._patience is None or evaluations_without_improvement(held_out) < self._patience:
            return False
        if not self._recorded:
            self._recorded = True
            best = min((loss, step) for step, loss in held_out.items() if loss is not None)
            self._events.emit(
                EVENT,
                f"early stopping after step {self._events.step}: the held-out loss was lowest at step {best[1]} "
                f"({best[0]:.4f}) and did not fall below that in the next {self._patience} evaluations",
                warn=False,
                lowest_at=best[1],
            )
        return True
