"""`loratune sweep`: train a recipe with different settings, drop worse ones early, and rank them.

    settings → trials, all prepared → rung after rung: each trial goes on as a run of its own → survivors → table, page

Each trial goes through the functions of `train`. What is decided depends on the losses in `losses/` alone, so a sweep
that was killed makes the same decisions again and continues where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.planning.auto import output_dir
from loratune.recipe.recipe import Recipe, as_recipe
from loratune.run import processes
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.legs import Legs
from loratune.workflows.search.rungs import run_sweep
from loratune.workflows.search.settings import draw_trials, parse_settings, with_settings
from loratune.workflows.search.shared_base import SharedBase
from loratune.workflows.search.trials import prepare_trials, rungs_of, write_plan
from loratune.workflows.search.workers import trials_at_once

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loratune.run.records.sweep import SweepPlanRecord, SweepRecord
    from loratune.workflows.search.trials import Trial
    from loratune.workflows.search.workers import Workers


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        folder: The sweep's folder.
        record: What `--json` prints.
    """

    folder: Path
    record: SweepRecord

    @property
    def recipe(self) -> Path:
        """The recipe with the settings of the best trial."""
        return SweepDir(self.folder).best

    def __repr__(self) -> str:
        """Return the folder and the best trial: the record holds all of them."""
        return f"SweepResult({str(self.folder)!r}: {self.record.sentences[0]})"


def sweep(
    recipe: Recipe | str | Path,
    settings: Sequence[str],
    *,
    trials: int | None = None,
    budget: float | None = None,
    halving: bool = True,
    overwrite: bool = False,
    workers: Workers | None = None,
    progress: Progress = NO_PROGRESS,
) -> SweepResult:
    """Train a recipe with different settings, and rank them by the held-out loss on the same rows.

    The same call continues where an earlier one was stopped.

    Args:
        recipe: What all trials share: a recipe, or its file.
        settings: `section.field=value,value` or `section.field=low..high`; with one value, all trials have it.
        trials: How many trials to draw at random; None: every combination of lists, or 16 with a range.
        budget: Seconds for all trials together; the rest is dropped where they do not suffice. None: no limit.
        halving: Whether trials that are worse are dropped early; if not, all are trained to the end.
        overwrite: Whether an existing sweep in the folder may be deleted.
        workers: Processes that take trials, several at once; None: this one takes them one after the other.
        progress: Shows how far the sweep is.

    Raises:
        RecipeError, DataError, MachineError: Nothing was started, or the machine cannot do a trial.
        Interrupted: The user stopped it.
        RunError: All trials failed.
    """
    processes.start()
    fixed, swept = parse_settings(settings)
    base = with_settings(as_recipe(recipe), fixed)
    drawn = draw_trials(swept, trials, base.train.seed)
    at_once = trials_at_once(workers, len(drawn))
    own = output_dir(base)
    folder = SweepDir.create(own.with_name(f"{own.name}-sweep"), overwrite=overwrite)
    with folder.exclusive():
        found = prepare_trials(folder, base, drawn, progress, at_once=at_once)
        plan = _plan(folder, base, found, halving=halving, budget=budget, at_once=at_once)
        legs = Legs(folder, plan, SharedBase(), progress, at_once)
        record = run_sweep(folder, plan, found, legs=legs, workers=workers, budget=budget, progress=progress)
    return SweepResult(folder=folder.root, record=record)


def _plan(
    folder: SweepDir, base: Recipe, trials: Sequence[Trial], *, halving: bool, budget: float | None, at_once: int = 1
) -> SweepPlanRecord:
    """Plan the rungs of a new sweep; return what was written, now or when it began.

    Raises:
        RecipeError: The sweep in the folder drops trials early and this one does not, or the other way round.
    """
    rungs = rungs_of(trials, budget, at_once) if halving else [1.0]
    plan = write_plan(folder, base, trials, rungs)
    began_halving = len(plan.rungs) > 1
    if began_halving is not halving and len(trials) > 1:
        raise RecipeError(
            f"the sweep in the folder was begun {'with' if began_halving else 'without'} halving",
            file=folder.root,
            fix=f"{'without' if began_halving else 'with'} --no-halving (in Python: halving={began_halving}) to "
            "continue it, or --overwrite (overwrite=True) to start over",
        )
    return plan
