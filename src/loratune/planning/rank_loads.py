"""How the tokens of a run's steps are spread over ranks: counted on the run's own lengths, not estimated.

Uses the function that training uses (`data.steps.EpochPlan`). Called by `scaling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loratune.data.steps import EpochPlan, num_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SIMULATED_STEPS = 2000
"""The most steps of the first epoch that are simulated. An epoch is shuffled, so these represent the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSteps:
    """The steps of a run, as far as their lengths are known.

    Attributes:
        lengths: Tokens of each training example; for streamed data, of a sample.
        num_examples: Training examples of an epoch.
        batch_size: Examples of a step.
        seed: Seed of the shuffle.
        epochs: Epochs of the run; may be fractional.
    """

    lengths: Sequence[int]
    num_examples: int
    batch_size: int
    seed: int
    epochs: float

    @property
    def count(self) -> int:
        """Optimizer steps of the run."""
        return num_steps(self.num_examples, self.batch_size, self.epochs)

    @property
    def tokens(self) -> float:
        """Tokens of the run."""
        return self.epochs * self.num_examples / len(self.lengths) * sum(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankLoads:
    """What the ranks have to do in the simulated steps, in tokens.

    Attributes:
        num_steps: Steps that were simulated.
        is_epoch: Whether these are all steps of an epoch.
        tokens: Tokens of these steps.
        slowest: Tokens of the rank that has the most, for each step.
        heaviest: Tokens of the rank that has the most, for each micro-batch.
        idle: Fraction of ranks without an example in a step, 0 to 1.
    """

    num_steps: int
    is_epoch: bool
    tokens: int
    slowest: np.ndarray
    heaviest: np.ndarray
    idle: float


def simulate_loads(steps: SimulatedSteps, *, token_budget: int, world_size: int) -> RankLoads:
    """Assign the steps of the first epoch to ranks, `MAX_SIMULATED_STEPS` at most, and count the tokens of each rank.

    Args:
        steps: The steps of the run.
        token_budget: The most tokens of a micro-batch.
        world_size: The number of ranks.
    """
    plan = EpochPlan(
        lengths=steps.lengths,
        batch_size=steps.batch_size,
        seed=steps.seed,
        epoch=0,
        token_budget=token_budget,
        world_size=world_size,
    )
    count = min(len(plan), MAX_SIMULATED_STEPS)
    slowest, heaviest, tokens, idle = [], [], 0, 0
    for number in range(count):
        ranks = np.array(
            [[sum(steps.lengths[i] for i in batch) for batch in rank] for rank in plan[number].ranks], dtype=np.int64
        )
        slowest.append(int(ranks.sum(axis=1).max()))
        heaviest += ranks.max(axis=0).tolist()
        idle += int((ranks.sum(axis=1) == 0).sum())
        tokens += int(ranks.sum())
    return RankLoads(
        num_steps=count,
        is_epoch=count == len(plan),
        tokens=tokens,
        slowest=np.array(slowest),
        heaviest=np.array(heaviest),
        idle=idle / (count * world_size),
    )
