"""Successive halving: which trials continue, and how far (Jamieson and Talwalkar 2016, arXiv 1502.07943).

All trials are trained to the first rung, a fraction of their steps; there the better ones are chosen, and continue to
the next rung, twice as far. At most half of them continue: the best quarter always, and of the next quarter those that
a paired test on the held-out rows cannot tell from the best.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratune.evaluation.record import paired_differences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratune.evaluation.record import NllPair

MAX_HALVINGS = 3
ERROR_RATE = 0.05
"""Probability that any of the intervals of a comparison misses its true difference."""
BUDGET_SHARE = 1 / 3
"""The share of a time budget that the first rung may take."""
FEWEST_STEPS = 4
"""Steps of a first rung that a time budget may shorten it to."""


def plan_rungs(
    num_trials: int, num_steps: int, *, run_seconds: float = 0.0, budget: float | None = None, at_once: int = 1
) -> list[float]:
    """Return the fractions of a run at which trials are compared; the last one is 1.

    Args:
        num_trials: Trials.
        num_steps: Optimizer steps of the shortest trial.
        run_seconds: Seconds that one whole trial takes.
        budget: Seconds by the clock for all of them; the first rung is made short enough. None: no limit.
        at_once: How many trials are taken at the same time.
    """
    num_halvings = min(MAX_HALVINGS, int(math.log2(num_trials))) if num_trials > 1 else 0
    first = 0.5**num_halvings
    while (
        budget is not None
        and by_clock([first * run_seconds] * num_trials, at_once) > BUDGET_SHARE * budget
        and first / 2 * num_steps >= FEWEST_STEPS
    ):
        first /= 2
    rungs = [first]
    while rungs[-1] < 1:
        rungs.append(min(1.0, 2 * rungs[-1]))
    return rungs


def by_clock(seconds: Sequence[float], at_once: int) -> float:
    """Return how long trials of so many seconds each take by the clock, if so many are taken at once.

    No less than the longest, and no less than all workers need for the sum.
    """
    return max(math.fsum(seconds) / at_once, max(seconds, default=0.0))


def step_of(rung: float, num_steps: int) -> int | None:
    """Return the step of a rung; None for the end of the run."""
    step = math.ceil(rung * num_steps)
    return step if step < num_steps else None


def choose_survivors(losses: Mapping[int, Sequence[NllPair]]) -> list[int]:
    """Return the trials that continue, the best first.

    Args:
        losses: Trial → its held-out losses at this rung, row by row, all on the same rows.
    """
    ranked = sorted(losses, key=lambda trial: (mean_loss(losses[trial]), trial))
    if len(ranked) < 2:
        return ranked
    always, most = math.ceil(len(ranked) / 4), math.ceil(len(ranked) / 2)
    differences = paired_differences([losses[trial] for trial in ranked], level=level_for(len(ranked)))
    return ranked[:always] + [
        trial
        for trial, difference in zip(ranked[always:most], differences[always - 1 :], strict=False)
        if difference.low <= 0
    ]


def mean_loss(losses: Sequence[NllPair]) -> float:
    """Return the mean loss of all supervised tokens, in nats."""
    return math.fsum(total for total, _ in losses) / sum(count for _, count in losses)


def level_for(num_trials: int) -> float:
    """Return the confidence of each of the intervals between the best trial and the others (Bonferroni)."""
    return 1 - ERROR_RATE / max(1, num_trials - 1)
