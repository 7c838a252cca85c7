"""A sweep from rung to rung: the trials that continue are trained further, and the result is written."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from loratune.recipe.recipe import Recipe
from loratune.reporting.html import save_page
from loratune.reporting.sweep_page import sweep_page
from loratune.run.directory import write_text
from loratune.run.errors import RunError, plural
from loratune.run.records.files import read_record, write_record
from loratune.run.records.sweep import SweepPlanRecord, SweepRecord
from loratune.workflows.search.halving import choose_survivors
from loratune.workflows.search.results import TrialSoFar, rank_trials
from loratune.workflows.search.settings import as_words, with_settings
from loratune.workflows.search.workers import Lanes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from loratune.run.progress import Progress
    from loratune.workflows.search.folder import SweepDir
    from loratune.workflows.search.legs import Legs
    from loratune.workflows.search.trials import Trial
    from loratune.workflows.search.workers import Workers


def run_sweep(
    folder: SweepDir,
    plan: SweepPlanRecord,
    trials: Sequence[Trial],
    *,
    legs: Legs,
    budget: float | None,
    progress: Progress,
    workers: Workers | None = None,
) -> SweepRecord:
    """Take all trials from rung to rung; write the result, and return it.

    Args:
        folder: The sweep's folder.
        plan: What is tried.
        trials: The trials, prepared.
        legs: What takes a trial to a rung, and knows how far it was taken.
        budget: Seconds by the clock for all trials together; None: no limit.
        progress: Shows how far the sweep is.
        workers: Processes that take trials; None: this one.
    """
    with nullcontext() if workers is None else workers.on(folder, trials):
        waiting = _take_all_rungs(plan, trials, legs, Lanes(legs, workers), budget, progress)
    return write_result(folder, plan, legs.measured(trials), waiting)


def _take_all_rungs(
    plan: SweepPlanRecord, trials: Sequence[Trial], legs: Legs, lanes: Lanes, budget: float | None, progress: Progress
) -> set[int]:
    """Take trials from rung to rung until few enough are left; return those for which there was no time."""
    going, waiting = list(trials), set[int]()
    for rung, fraction in enumerate(plan.rungs):
        affordable = legs.affordable(going, rung, budget) if rung else going
        if len(affordable) < len(going):
            progress.warn(f"time for {len(affordable)} of {len(going)} trials to {fraction:.0%} of a run")
        waiting |= {trial.number for trial in going} - {trial.number for trial in affordable}
        if not affordable:
            break
        taken, left_out = lanes.take_all(affordable, rung, budget)
        waiting |= left_out
        measured = {number: losses for number, losses in taken.items() if losses}
        going = [trials[number - 1] for number in choose_survivors(measured)]
        if rung + 1 < len(plan.rungs):
            progress.line(f"{fraction:.0%} of a run: {len(going)} of {plural(len(measured), 'trial')} continue")
    return waiting


def write_result(
    folder: SweepDir, plan: SweepPlanRecord, trials: Sequence[TrialSoFar], waiting: Collection[int]
) -> SweepRecord:
    """Write result, page and the best recipe; return the result.

    Raises:
        RunError: All trials failed.
    """
    values = rank_trials(trials, waiting)
    if values["best"] is None:
        problem = next((trial.problem for trial in trials if trial.problem), "the time is too short for any trial")
        raise RunError(f"no trial has a held-out loss: {problem}", file=folder.root, fix="other settings, or more time")
    best = with_settings(Recipe.parse(plan.recipe), as_words(plan.trials[values["best"] - 1]))
    write_text(folder.best, best.to_yaml())
    where = {"folder": str(folder.root), "recipe": str(folder.best), "page": str(folder.page)}
    write_record(folder.result, SweepRecord, {**values, **where, "rungs": list(plan.rungs)})
    result = read_record(folder.result, SweepRecord)
    save_page(sweep_page(result), folder.page)
    return result
