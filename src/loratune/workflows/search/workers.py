"""What takes the trials of a sweep to the next rung: this process, one after the other, or several others at once."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from loratune.run.records.sweep import TrialLosses
    from loratune.training.held_out_loss import Nll
    from loratune.workflows.search.folder import SweepDir
    from loratune.workflows.search.legs import Legs
    from loratune.workflows.search.trials import Trial


class Workers(Protocol):
    """Processes that take trials.

    Attributes:
        size: How many there are, each with one trial at a time.
    """

    size: int

    def on(self, folder: SweepDir, trials: Sequence[Trial]) -> AbstractContextManager[None]:
        """Work on the sweep in a folder, whose plan is written, until the context ends."""

    def submit(self, trial: Trial, rung: int) -> None:
        """Let a free worker take a trial to a rung."""

    def result(self) -> tuple[int, TrialLosses]:
        """Wait for any of the trials under way; return its number and its losses at the rung.

        Raises:
            LoratuneError: What ends the sweep, not only the trial.
        """


def trials_at_once(workers: Workers | None, num_trials: int) -> int:
    """Return how many of so many trials are taken at once."""
    return 1 if workers is None else min(workers.size, num_trials)


class Lanes:
    """Takes the trials of a sweep to a rung, as many at once as there are workers.

    Args:
        legs: What is known of the trials, and what takes them without workers.
        workers: None: this process takes one trial after the other.
    """

    def __init__(self, legs: Legs, workers: Workers | None) -> None:
        self._legs, self._workers = legs, workers
        self._under_way: list[Trial] = []

    def take_all(self, trials: Sequence[Trial], rung: int, budget: float | None) -> tuple[dict[int, Nll], set[int]]:
        """Return the losses of the trials by number, and the numbers of those for which no time was left.

        Args:
            trials: Trials that were not dropped.
            rung: The rung, from 0. At the first one, the first trial starts whatever the budget is.
            budget: Seconds by the clock for the whole sweep; None: no limit.
        """
        queue, left_out = deque(trials), set[int]()
        found: dict[int, TrialLosses] = {}
        at_once = trials_at_once(self._workers, len(trials))
        while queue or self._under_way:
            while queue and len(self._under_way) < at_once:
                trial = queue.popleft()
                if (known := self._legs.known(trial, rung)) is not None:
                    found[trial.number] = known
                elif rung == 0 and (found or self._under_way) and not self._is_affordable(trial, rung, budget):
                    if self._under_way:  # what these take decides, not what was planned
                        queue.appendleft(trial)
                        break
                    left_out.add(trial.number)
                else:
                    self._start(trial, rung)
            if self._under_way:
                number, losses = self._result(rung)
                self._under_way = [trial for trial in self._under_way if trial.number != number]
                found[number] = losses
        # In the order of the trials, not of their ends, so that the same decisions follow.
        return {t.number: list(found[t.number].losses) for t in trials if t.number in found}, left_out

    def _is_affordable(self, trial: Trial, rung: int, budget: float | None) -> bool:
        return trial in self._legs.affordable([*self._under_way, trial], rung, budget)

    def _start(self, trial: Trial, rung: int) -> None:
        self._under_way.append(trial)
        if self._workers is not None:
            self._workers.submit(trial, rung)

    def _result(self, rung: int) -> tuple[int, TrialLosses]:
        if self._workers is not None:
            return self._workers.result()
        (trial,) = self._under_way
        return trial.number, self._legs.take(trial, rung)
