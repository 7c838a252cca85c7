"""`loratune sweep`: train a recipe with different settings, drop what is worse, and rank the rest.

    settings → trials, all prepared → rung after rung: each trial goes on as a run of its own → survivors → table, page

Each trial goes through the functions of `train`. What is decided depends on the losses in `losses/` alone, so a sweep
that was killed makes the same decisions again and goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.planning.auto import output_dir
from loratune.planning.lock import examples_fingerprint
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe, as_recipe
from loratune.reporting.html import save_page
from loratune.reporting.sweep_page import sweep_page
from loratune.run import processes
from loratune.run.directory import RunDir, read_json, write_text
from loratune.run.errors import RecipeError, RunError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.records.files import read_record, write_record
from loratune.run.records.sweep import SweepPlanRecord, SweepRecord
from loratune.workflows.locked_recipe import located
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.halving import choose_survivors, plan_rungs
from loratune.workflows.search.legs import Legs, Trial
from loratune.workflows.search.results import TrialSoFar, rank_trials
from loratune.workflows.search.settings import (
    Settings,
    as_words,
    draw_trials,
    parse_settings,
    with_settings,
)
from loratune.workflows.search.shared_base import SharedBase

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from loratune.planning.preparation import Preparation
    from loratune.training.held_out_loss import Nll


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
    progress: Progress = NO_PROGRESS,
) -> SweepResult:
    """Train a recipe with different settings, and rank them by the held-out loss on the same rows.

    The same call goes on where an earlier one was stopped.

    Args:
        recipe: What all trials share: a recipe, or its file.
        settings: `section.field=value,value` or `section.field=low..high`; with one value, all trials have it.
        trials: How many trials to draw at random; None: every combination of lists, or 16 with a range.
        budget: Seconds for all trials together; the rest is dropped where they do not suffice. None: no limit.
        halving: Whether trials that are worse are dropped early; if not, all are trained to the end.
        overwrite: Whether an existing sweep in the folder may be deleted.
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
    own = output_dir(base)
    folder = SweepDir.create(own.with_name(f"{own.name}-sweep"), overwrite=overwrite)
    with folder.exclusive():
        found = prepare_trials(folder, base, drawn, progress)
        plan = _plan(folder, base, found, halving=halving, budget=budget)
        return run_sweep(folder, plan, found, base=SharedBase(), budget=budget, progress=progress)


def prepare_trials(folder: SweepDir, base: Recipe, drawn: Sequence[Settings], progress: Progress) -> list[Trial]:
    """Prepare all trials before the weights load: the data once, everything else for each.

    Raises:
        RecipeError: The sweep in the folder is another one, no data is held out, or trials would be compared on
            different rows.
    """
    given = {"recipe": base.model_dump(mode="json", exclude_unset=True), "trials": drawn}
    before = read_json(folder.plan) if folder.plan.is_file() else None
    if before is not None and any(before[name] != value for name, value in given.items()):
        raise RecipeError(
            "the folder holds a sweep of another recipe or of other settings",
            file=folder.root,
            fix="--overwrite (in Python: overwrite=True) to start over, or train.output_dir=… for another folder",
        )
    dtype = before["dtype"] if before is not None else None
    found: list[Trial] = []
    with progress.task("preparing", len(drawn), "trials") as task:
        for number, settings in enumerate(drawn, 1):
            run = folder.trial(number)
            recipe = with_settings(base, as_words(settings)).replace(train={"output_dir": str(run.root)})
            prepared = _prepare(recipe, run, found[0].prepared if found else None, dtype, progress)
            dtype = prepared.recipe.model.dtype
            found.append(Trial(number=number, settings=settings, recipe=recipe, prepared=prepared, run=run))
            task.advance()
    return found


def _prepare(
    recipe: Recipe, run: RunDir, first: Preparation | None, dtype: str | None, progress: Progress
) -> Preparation:
    """Prepare a trial: one that has begun from its lock, as `resume` does."""
    if run.lock.is_file():
        recipe = Recipe.parse(located(read_json(run.lock)), file=run.lock)
    elif dtype is not None:  # it may be measured, and trials must not differ in it
        recipe = recipe.replace(model={"dtype": dtype})
    same_rows = first is not None and first.recipe.train.seed == recipe.train.seed
    prepared = prepare(recipe, progress, like=first if same_rows else None)
    if not prepared.data.eval:
        raise RecipeError("no data is held out, so trials cannot be compared", fix="data.eval=FILE, or data.eval=0.1")
    if prepared.data.stream is not None:
        raise RecipeError("a sweep reads the data once, and streamed rows are read anew", fix="data.streaming=false")
    if (
        first is not None
        and not same_rows
        and examples_fingerprint(first.data.eval) != examples_fingerprint(prepared.data.eval)
    ):
        raise RecipeError(
            "train.seed decides which rows are held out, so its trials cannot be compared", fix="data.eval=FILE"
        )
    return prepared


def _plan(
    folder: SweepDir, base: Recipe, trials: Sequence[Trial], *, halving: bool, budget: float | None
) -> SweepPlanRecord:
    rungs = [1.0]
    if halving:
        rungs = plan_rungs(
            len(trials),
            min(trial.num_steps for trial in trials),
            run_seconds=max(trial.prepared.estimate.time.train_seconds for trial in trials),
            budget=budget,
        )
    return write_plan(folder, base, trials, rungs)


def write_plan(folder: SweepDir, base: Recipe, trials: Sequence[Trial], rungs: Sequence[float]) -> SweepPlanRecord:
    """Write down what a sweep does when it starts; return what was written, now or then."""
    if not folder.plan.is_file():
        record = {
            "recipe": base.model_dump(mode="json", exclude_unset=True),
            "trials": [trial.settings for trial in trials],
            "rungs": list(rungs),
            "dtype": trials[0].prepared.recipe.model.dtype,
        }
        write_record(folder.plan, SweepPlanRecord, record)
    return read_record(folder.plan, SweepPlanRecord)


def run_sweep(
    folder: SweepDir,
    plan: SweepPlanRecord,
    trials: Sequence[Trial],
    *,
    base: SharedBase,
    budget: float | None,
    progress: Progress,
) -> SweepResult:
    """Take all trials from rung to rung, and write the result."""
    legs = Legs(folder, plan, base, progress)
    going, waiting = list(trials), list[Trial]()
    for rung, fraction in enumerate(plan.rungs):
        affordable = legs.affordable(going, rung, budget) if rung else going
        if len(affordable) < len(going):
            progress.warn(f"time for {len(affordable)} of {len(going)} trials to {fraction:.0%} of a run")
        if not affordable:
            waiting += going
            break
        measured: dict[int, Nll] = {}
        for trial in affordable:
            if rung == 0 and measured and not legs.affordable([trial], rung, budget):
                waiting.append(trial)
            elif (losses := legs.take(trial, rung)).losses:
                measured[trial.number] = list(losses.losses)
        going = [trials[number - 1] for number in choose_survivors(measured)]
        if rung + 1 < len(plan.rungs):
            progress.line(f"{fraction:.0%} of a run: {len(going)} of {plural(len(affordable), 'trial')} go on")
    return write_result(folder, plan, [legs.measured(trial) for trial in trials], {trial.number for trial in waiting})


def write_result(
    folder: SweepDir, plan: SweepPlanRecord, trials: Sequence[TrialSoFar], waiting: Collection[int]
) -> SweepResult:
    """Write result, page and the best recipe.

    Raises:
        RunError: All trials failed.
    """
    values = rank_trials(trials, waiting)
    if values["best"] is None:
        problem = next((trial.problem for trial in trials if trial.problem), "the time suffices for no trial")
        raise RunError(f"no trial has a held-out loss: {problem}", file=folder.root, fix="other settings, or more time")
    best = with_settings(Recipe.parse(plan.recipe), as_words(plan.trials[values["best"] - 1]))
    write_text(folder.best, best.to_yaml())
    where = {"folder": str(folder.root), "recipe": str(folder.best), "page": str(folder.page)}
    write_record(folder.result, SweepRecord, {**values, **where, "rungs": list(plan.rungs)})
    result = read_record(folder.result, SweepRecord)
    save_page(sweep_page(result), folder.page)
    return SweepResult(folder=folder.root, record=result)
