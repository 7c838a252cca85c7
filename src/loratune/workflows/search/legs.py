"""The legs of a sweep's trials: a leg trains one trial to a rung, as an ordinary run, and records its held-out
losses."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from loratune.model.device import free_memory
from loratune.run.directory import RunDir
from loratune.run.errors import Interrupted, OutOfMemory, RecipeError, RunError
from loratune.run.records.files import read_record, write_record
from loratune.run.records.sweep import TrialLosses
from loratune.run.run_log import RunLog
from loratune.workflows.assess import explain_out_of_memory
from loratune.workflows.resume import continue_run
from loratune.workflows.search.halving import by_clock, step_of
from loratune.workflows.search.results import TrialSoFar
from loratune.workflows.search.settings import short_name
from loratune.workflows.search.trials import run_seconds, slowdown
from loratune.workflows.start import start_run
from loratune.workflows.steps import Leg, Paused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loratune.run.progress import Progress
    from loratune.run.records.sweep import SweepPlanRecord
    from loratune.training.held_out_loss import Nll
    from loratune.workflows.search.folder import SweepDir
    from loratune.workflows.search.shared_base import SharedBase
    from loratune.workflows.search.trials import Trial


class Legs:
    """Takes trials from rung to rung, one after the other, and records their held-out losses.

    Args:
        folder: The sweep's folder.
        plan: What is tried.
        base: The base model that the trials share.
        progress: Shows how far a trial is.
        at_once: How many trials are taken at the same time, by this process or by others.
    """

    def __init__(
        self, folder: SweepDir, plan: SweepPlanRecord, base: SharedBase, progress: Progress, at_once: int = 1
    ) -> None:
        self._folder, self._plan, self._base, self._progress = folder, plan, base, progress
        self._at_once = at_once

    def measured(self, trials: Sequence[Trial]) -> list[TrialSoFar]:
        """Return the trials as far as they were taken.

        One that early stopping ended before the last rung counts as far as the furthest of them got, and no further.
        """
        recorded = [list(self._recorded(trial)) for trial in trials]
        furthest = max((len(rungs) for rungs in recorded if not any(rung.problem for rung in rungs)), default=0)
        for rungs in recorded:
            if rungs and rungs[-1].is_final:
                rungs.extend([rungs[-1]] * (furthest - len(rungs)))
        return [
            TrialSoFar(number=trial.number, settings=trial.settings, run=str(trial.run.root), rungs=tuple(rungs))
            for trial, rungs in zip(trials, recorded, strict=True)
        ]

    def _recorded(self, trial: Trial) -> Iterator[TrialLosses]:
        for rung in range(len(self._plan.rungs)):
            path = self._folder.losses(trial.number, rung)
            if path.is_file():
                losses = read_record(path, TrialLosses)
                # The losses of a finished trial are known before its report is written.
                if not losses.is_final or trial.run.is_complete:
                    yield losses

    def affordable(self, trials: Sequence[Trial], rung: int, budget: float | None) -> list[Trial]:
        """Return the trials that are at a rung already, and those that the rest of the budget takes there."""
        if budget is None:
            return list(trials)
        spent = [self._seconds_at(number) for number in range(len(self._plan.rungs))]
        chosen = []
        for trial in trials:
            needed = self._expected_seconds(trial, rung)
            spent[rung].append(needed)
            if not needed or math.fsum(by_clock(seconds, self._at_once) for seconds in spent) <= budget:
                chosen.append(trial)
        return chosen

    def _seconds_at(self, rung: int) -> list[float]:
        """Return the seconds that each trial took to a rung from the one before."""
        paths = (path for path in self._folder.all_losses() if path.stem.endswith(f"-{rung}"))
        return [read_record(path, TrialLosses).seconds for path in paths]

    def _expected_seconds(self, trial: Trial, rung: int) -> float:
        """Return the seconds that a trial needs to a rung: at its own speed so far, or else at the plan's."""
        known = list(self._recorded(trial))
        if len(known) > rung or (known and known[-1].is_final):
            return 0.0
        planned, until = trial.prepared.estimate.time, step_of(self._plan.rungs[rung], trial.num_steps)
        steps = (until or trial.num_steps) - (known[-1].step if known else 0)
        evaluation = planned.evaluate_seconds * slowdown(trial.prepared, self._at_once) if until is None else 0.0
        if known:
            return evaluation + steps * math.fsum(losses.seconds for losses in known) / known[-1].step
        return evaluation + steps / trial.num_steps * run_seconds(trial.prepared, self._at_once)

    def known(self, trial: Trial, rung: int) -> TrialLosses | None:
        """Return the losses of a trial at a rung, or where it ended before; None if it is still to be taken there."""
        known = list(self._recorded(trial))
        if len(known) > rung:
            return known[rung]
        return known[-1] if known and (known[-1].is_final or known[-1].problem) else None

    def take(self, trial: Trial, rung: int) -> TrialLosses:
        """Take a trial to a rung, and return its losses."""
        known = list(self._recorded(trial))
        until = step_of(self._plan.rungs[rung], trial.num_steps)
        where = f"step {until} of {trial.num_steps}" if until is not None else "the end"
        self._progress.line(f"trial {trial.number}, {short_name(trial.settings)}: to {where}")
        path, started = self._folder.losses(trial.number, rung), time.monotonic()

        def record(step: int | None, losses: Nll, problem: str = "") -> None:
            if not all(math.isfinite(total) for total, _ in losses):
                losses, problem = [], "the held-out loss is not a finite number"
            values = {
                "step": _last_step(trial.run) if step is None else step,
                "is_final": step is None and not problem,
                "losses": losses,
                "seconds": time.monotonic() - started,
            }
            write_record(path, TrialLosses, {**values, **({"problem": problem} if problem else {})})

        paused = step_of(self._plan.rungs[rung - 1], trial.num_steps) if rung else None
        leg = Leg(load=self._base, until=until, dropped=paused, on_losses=record, base_losses=self._base.losses)
        try:
            with explain_out_of_memory(trial.run):
                self._go(trial, leg)
        except Paused:
            pass
        except Interrupted as error:
            again = "run the same command again to continue"
            raise type(error)(f"trial {trial.number}: {error.problem}", file=self._folder.root, fix=again) from None
        except (RunError, OutOfMemory) as error:  # such as a loss of NaN: a bad setting loses, and the others go on
            self._progress.warn(f"trial {trial.number} failed: {error.problem}")
            record(known[-1].step if known else 0, [], error.problem)
        finally:
            free_memory()
        if not path.is_file():
            raise RecipeError(
                "the trial was finished outside the sweep, which does not know its losses",
                file=trial.run.root,
                fix="--overwrite (in Python: overwrite=True) to start the sweep over",
            )
        return read_record(path, TrialLosses)

    def _go(self, trial: Trial, leg: Leg) -> None:
        """Start or continue the run of a trial."""
        has_begun, root = trial.run.lock.is_file(), trial.run.root
        run = RunDir.open(root) if has_begun else RunDir.create(root, overwrite=False)
        with RunLog(self._progress, run.log) as log:
            if has_begun:
                continue_run(run, log, trial.prepared, leg)
            else:
                start_run(trial.prepared, run, trial.recipe.to_yaml(), log, leg)


def _last_step(run: RunDir) -> int:
    """Return the last step of a finished run, which may have ended early."""
    return max((int(record["step"]) for record in run.read_metrics() if "step" in record), default=0)
