"""The trials of a sweep: each is prepared before the weights load, and what is tried is written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.planning.auto import free_device_bytes
from loratune.planning.lock import examples_fingerprint
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import MachineError, RecipeError
from loratune.run.records.files import read_record, write_record
from loratune.run.records.sweep import SweepPlanRecord
from loratune.workflows.locked_recipe import located
from loratune.workflows.search.halving import plan_rungs
from loratune.workflows.search.settings import Settings, as_words, with_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.planning.preparation import Preparation
    from loratune.run.progress import Progress
    from loratune.workflows.search.folder import SweepDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A trial.

    Attributes:
        number: Its number, from 1.
        settings: What it has for itself.
        recipe: Its recipe, with `auto` unresolved.
        prepared: What is known before the weights load.
        run: Its run directory.
    """

    number: int
    settings: Settings
    recipe: Recipe
    prepared: Preparation
    run: RunDir

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the full run."""
        return self.prepared.estimate.num_steps


def prepare_trials(
    folder: SweepDir, base: Recipe, drawn: Sequence[Settings], progress: Progress, *, at_once: int = 1
) -> list[Trial]:
    """Prepare all trials before the weights load: the data once, everything else for each.

    Args:
        folder: The sweep's folder.
        base: What all trials share.
        drawn: What each has for itself.
        progress: Shows how far it is.
        at_once: How many trials are trained at the same time.

    Raises:
        RecipeError: The sweep in the folder is another one, no data is held out, or trials would be compared on
            different rows.
        MachineError: Not so many trials fit the machine at once.
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
            prepared = _prepare(recipe, run, found[0].prepared if found else None, dtype, progress, at_once)
            dtype = prepared.recipe.model.dtype
            found.append(Trial(number=number, settings=settings, recipe=recipe, prepared=prepared, run=run))
            task.advance()
    return found


def _prepare(
    recipe: Recipe, run: RunDir, first: Preparation | None, dtype: str | None, progress: Progress, at_once: int
) -> Preparation:
    """Prepare a trial: one that has begun from its lock, as `resume` does."""
    if run.lock.is_file():
        recipe = Recipe.parse(located(read_json(run.lock)), file=run.lock)
    elif dtype is not None:  # it may be measured, and trials must not differ in it
        recipe = recipe.replace(model={"dtype": dtype})
    same_rows = first is not None and first.recipe.train.seed == recipe.train.seed
    prepared = prepare(recipe, progress, like=first if same_rows else None, at_once=at_once)
    _check_share(prepared, at_once)
    if not prepared.data.eval:
        raise RecipeError("no data is held out, so trials cannot be compared", fix="data.eval=FILE, or data.eval=0.1")
    if prepared.data.stream is not None:
        raise RecipeError(
            "a sweep reads the data once, but streamed rows are read again for every run", fix="data.streaming=false"
        )
    if (
        first is not None
        and not same_rows
        and examples_fingerprint(first.data.eval) != examples_fingerprint(prepared.data.eval)
    ):
        raise RecipeError(
            "train.seed decides which rows are held out, so its trials cannot be compared", fix="data.eval=FILE"
        )
    return prepared


def _check_share(prepared: Preparation, at_once: int) -> None:
    """Check that a run fits its share of the memory: one that has begun keeps the micro-batches that it began with.

    Raises:
        MachineError: It does not.
    """
    share, needed = free_device_bytes(prepared.recipe.train.device, at_once), prepared.estimate.memory.peak_bytes
    if at_once > 1 and share is not None and needed > share:
        raise MachineError(
            f"a trial needs {needed / 2**30:.1f} GiB, and {at_once} at once have {share / 2**30:.1f} GiB each",
            fix="a smaller --workers",
        )


def slowdown(prepared: Preparation, at_once: int) -> int:
    """Return by how much a run is slower than planned if so many share the machine: on a CPU, they share the cores."""
    return at_once if prepared.recipe.train.device == "cpu" else 1


def run_seconds(prepared: Preparation, at_once: int) -> float:
    """Return the planned seconds of a run's training, if so many share the machine."""
    return prepared.estimate.time.train_seconds * slowdown(prepared, at_once)


def rungs_of(trials: Sequence[Trial], budget: float | None, at_once: int) -> list[float]:
    """Return the fractions of a run at which these trials are compared; the arguments are those of `plan_rungs`."""
    return plan_rungs(
        len(trials),
        min(trial.num_steps for trial in trials),
        run_seconds=max(run_seconds(trial.prepared, at_once) for trial in trials),
        budget=budget,
        at_once=at_once,
    )


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
