"""Early stopping: when the held-out loss has gone long enough without falling.

Everything follows from the held-out losses, which stand in `metrics.jsonl` and which all processes know. So a run that goes
on stops where the uninterrupted one would have, and no process before another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from loratune.recipe.recipe import TrainSection
from loratune.training.event_log import EventLog, History

EVENT = "early_stopping"


def evaluations_without_improvement(held_out: Mapping[int, float | None]) -> int:
    """Evaluations since the one with the lowest held-out loss, the earliest of equals: what transformers' `EarlyStoppingCallback`
    counts with a threshold of 0. One that failed says nothing and does not count; a loss that is no number is not lower.

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
    """Whether a run is to end before its last step.

    Args:
        train: The recipe's section.
        events: Where the end is told.
        history: Of the steps before.
    """

    def __init__(self, train: TrainSection, events: EventLog, history: History) -> None:
        self._most, self._events, self._told = train.early_stopping, events, history.stopped_early

    def is_over(self, held_out: Mapping[int, float | None]) -> bool:
        """Whether `train.early_stopping` evaluations went by without a lower loss; says so the first time."""
        if self._most is None or evaluations_without_improvement(held_out) < self._most:
            return False
        if not self._told:
            self._told = True
            best = min((loss, step) for step, loss in held_out.items() if loss is not None)
            self._events.emit(
                EVENT,
                f"training ends early, after step {self._events.step}: the held-out loss was lowest at step {best[1]} "
                f"({best[0]:.4f}), and no lower in the {self._most} evaluations since",
                told=False,
                lowest_at=best[1],
            )
        return True
