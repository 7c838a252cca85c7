"""`loratune tune`: choose learning rate, rank and target modules within a time budget, with a reason for each.

    learning-rate range test → ranks and targets at the best rate → the smallest adapter that no other one beats

Both are sweeps of the same recipe: the same seed, the same rows in the same order, losers dropped early.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.evaluation.record import paired_differences
from loratune.planning.auto import output_dir
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe, as_recipe
from loratune.run import processes
from loratune.run.directory import RunDir, read_json, write_text
from loratune.run.errors import MachineError, RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.records.files import read_record, write_record
from loratune.run.records.sweep import SweepRecord, TrialLosses, TrialResult, TuneRecord
from loratune.workflows.search.folder import SweepDir, TuneDir
from loratune.workflows.search.halving import by_clock
from loratune.workflows.search.legs import Legs
from loratune.workflows.search.rungs import run_sweep
from loratune.workflows.search.settings import Settings, as_words, short_name, with_settings
from loratune.workflows.search.shared_base import SharedBase
from loratune.workflows.search.trials import prepare_trials, rungs_of, write_plan
from loratune.workflows.search.workers import trials_at_once

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratune.recipe.sections.lora import LoraSection
    from loratune.training.held_out_loss import Nll
    from loratune.workflows.search.workers import Workers

RATES = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
"""Learning rates of the range test, about half a decade apart."""
RANKS = (8, 32)
TARGETS = ("attention", "complete")
"""What is tried beside the recipe's own rank and targets."""
RATE_SHARE = 0.5
"""The share of the budget that the range test may take."""
UNSCORED = ("evaluate.metric=none", "evaluate.samples=0", "evaluate.samples_every=never")
"""Trials are compared by their held-out loss, so none of them answers prompts."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TuneResult:
    """Settings that were found.

    Attributes:
        recipe: The recipe with these settings.
        record: What `--json` prints.
    """

    recipe: Path
    record: TuneRecord

    def __repr__(self) -> str:
        """Return the recipe's file and the settings: the record holds all trials."""
        return f"TuneResult({str(self.recipe)!r}: {short_name(self.record.settings)})"


def tune(
    recipe: Recipe | str | Path,
    *,
    budget: float = 900.0,
    overwrite: bool = False,
    workers: Workers | None = None,
    progress: Progress = NO_PROGRESS,
) -> TuneResult:
    """Find a learning rate, a rank and target modules for a recipe, and write it with them.

    The same call continues where an earlier one was stopped.

    Args:
        recipe: The recipe, or its file.
        budget: Seconds for all trials together.
        overwrite: Whether earlier results in the folder may be deleted.
        workers: Processes that take trials, several at once; None: this one takes them one after the other.
        progress: Shows how far it is.

    Raises:
        RecipeError, DataError, MachineError: Nothing was started, or the machine cannot do a trial.
        Interrupted: The user stopped it.
        RunError: All trials failed.
    """
    processes.start()
    started = time.monotonic()
    given = as_recipe(recipe)
    own = output_dir(given)
    folder = TuneDir(own.with_name(f"{own.name}-tune").expanduser().resolve())
    with folder.exclusive(overwrite=overwrite):
        return _find(given, folder, budget, started, workers, progress)


def _find(
    given: Recipe, folder: TuneDir, budget: float, started: float, workers: Workers | None, progress: Progress
) -> TuneResult:
    """Run the range test, then the comparison of ranks and targets at its best rate, and choose."""
    bare, shared = with_settings(given, UNSCORED), SharedBase()
    stage = partial(_stage, shared=shared, workers=workers, progress=progress)

    progress.line(f"range test of the learning rate: {', '.join(RATES)}")
    drawn: list[Settings] = [{"train.learning_rate": rate} for rate in RATES]
    rates = stage(folder.rates, bare, drawn, RATE_SHARE * budget)
    best_rate = _best(rates).settings["train.learning_rate"]
    reasons = [_reason_for_rate(rates, _first_losses(rates))]

    shared.release()  # or the plans of the next trials would count it as somebody else's memory
    fast = with_settings(bare, [f"train.learning_rate={best_rate}"])
    shapes, left_out = _fitting(fast, _shapes(given), progress, workers)
    spent = max(time.monotonic() - started, _seconds(rates, trials_at_once(workers, len(drawn))))
    chosen = _best(rates).settings
    found = None
    if len(shapes) > 1 and spent < budget:
        progress.line(f"ranks and targets at learning rate {best_rate}: {len(shapes)} trials")
        found = stage(folder.shapes, fast, shapes, budget - spent)
        shape, reason = _choose_shape(found)
        chosen, reasons = {**chosen, **shape}, [*reasons, reason]
    else:
        why = "no time was left to compare others" if len(shapes) > 1 else "no others can be trained on this machine"
        reasons.append(f"lora.r and lora.targets stay as they are: {why}.")
    reasons += left_out
    return _write(folder, with_settings(given, as_words(chosen)), chosen, reasons, rates, found)


def _write(
    folder: TuneDir,
    recipe: Recipe,
    chosen: Settings,
    reasons: Sequence[str],
    rates: SweepRecord,
    shapes: SweepRecord | None,
) -> TuneResult:
    """Write the recipe that was found and why it is this one; return both."""
    write_text(folder.recipe, recipe.to_yaml())
    record = {
        "folder": str(folder.root),
        "recipe": str(folder.recipe),
        "settings": chosen,
        "reasons": list(reasons),
        "rates": rates.model_dump(mode="json"),
        "shapes": None if shapes is None else shapes.model_dump(mode="json"),
    }
    write_record(folder.result, TuneRecord, record)
    return TuneResult(recipe=folder.recipe, record=read_record(folder.result, TuneRecord))


def _stage(
    planned: SweepDir,
    base: Recipe,
    drawn: Sequence[Settings],
    budget: float,
    *,
    shared: SharedBase,
    workers: Workers | None,
    progress: Progress,
) -> SweepRecord:
    """Run a sweep of these trials."""
    folder, at_once = SweepDir.create(planned.root, overwrite=False), trials_at_once(workers, len(drawn))
    with folder.exclusive():
        trials = prepare_trials(folder, base, drawn, progress, at_once=at_once)
        plan = write_plan(folder, base, trials, rungs_of(trials, budget, at_once))
        legs = Legs(folder, plan, shared, progress, at_once)
        return run_sweep(folder, plan, trials, legs=legs, workers=workers, budget=budget, progress=progress)


def _best(record: SweepRecord) -> TrialResult:
    return next(trial for trial in record.trials if trial.number == record.best)


def _tied(record: SweepRecord) -> list[TrialResult]:
    """Return the trials that cannot be told apart from the best."""
    return [
        trial
        for trial in record.trials
        if trial.to_best is not None and trial.to_best.low <= 0 <= trial.to_best.high and trial.rungs
    ]


def _untried(record: SweepRecord) -> list[TrialResult]:
    """Return the trials for which there was no time at all."""
    return [trial for trial in record.trials if not trial.rungs and not trial.problem]


def _seconds(record: SweepRecord, at_once: int) -> float:
    """Return how long a sweep took by the clock, if it was not interrupted."""
    rungs = itertools.zip_longest(*(trial.rungs for trial in record.trials))
    return math.fsum(by_clock([rung.seconds for rung in at if rung is not None], at_once) for at in rungs)


# ---- the learning rate


def diverging_rates(record: SweepRecord, first: Mapping[int, Nll]) -> list[str]:
    """Return the rates at which training failed, or left the model worse than the lowest rate did.

    The lowest rate barely moves the weights in so few steps, so what is worse than that has destroyed something. It
    must be worse by more than the interval, and a rate that is as good as the best one in the end does not count.

    Args:
        record: The range test.
        first: Trial → its held-out losses at the first rung.
    """
    good = {record.best, *(trial.number for trial in _tied(record))}
    by_rate = sorted(record.trials, key=lambda trial: float(_rate(trial)))
    measured = [trial.number for trial in by_rate if trial.number in first]
    worse = set[int]()
    if len(measured) > 1:
        differences = paired_differences([first[number] for number in measured], level=record.level)
        worse = {number for number, found in zip(measured[1:], differences, strict=True) if found.low > 0}
    return [_rate(trial) for trial in by_rate if trial.problem or trial.number in worse - good]


def _rate(trial: TrialResult) -> str:
    return trial.settings["train.learning_rate"]


def _first_losses(record: SweepRecord) -> dict[int, Nll]:
    """Return trial → its held-out losses at the first rung."""
    folder = SweepDir(Path(record.folder))
    files = {trial.number: folder.losses(trial.number, 0) for trial in record.trials if trial.rungs}
    return {number: list(read_record(file, TrialLosses).losses) for number, file in files.items()}


def _reason_for_rate(record: SweepRecord, first: Mapping[int, Nll]) -> str:
    best, diverging, untried = _best(record), diverging_rates(record, first), _untried(record)
    rate = _rate(best)
    words = f"train.learning_rate={rate}: the lowest held-out loss of {len(record.trials) - len(untried)} rates, "
    words += f"{best.rungs[-1].nll:.4f} nats after step {best.rungs[-1].step}"
    if tied := _tied(record):
        words += f"; {', '.join(map(_rate, tied))} cannot be told apart from it"
    if diverging:
        words += f"; training gets worse at {', '.join(diverging)}"
    if untried:
        words += f"; no time was left to try {', '.join(map(_rate, untried))}"
    if rate in (RATES[0], RATES[-1]):
        words += "; this is the end of the range, and the best rate may lie beyond"
    return f"{words}."


# ---- rank and targets


def alpha_for(lora: LoraSection, r: int) -> float:
    """Return the alpha at which an adapter of another rank has the same scale (`variants.scale_of`)."""
    share = r / lora.r
    return lora.alpha * (math.sqrt(share) if lora.variant == "rslora" else share)


def _shapes(recipe: Recipe) -> list[Settings]:
    """Return ranks and targets to try, the recipe's own first, all with its scale: another would need its own rate."""
    lora = recipe.lora
    # With patterns, some modules have a rank or an alpha of their own, whose scale `alpha_for` would change.
    ranks = (lora.r,) if lora.rank_pattern or lora.alpha_pattern else dict.fromkeys((lora.r, *RANKS))
    own = lora.targets if isinstance(lora.targets, str) else f"[{', '.join(lora.targets)}]"
    return [
        {"lora.r": str(r), "lora.alpha": f"{alpha_for(lora, r):.8g}", "lora.targets": targets}
        for targets in dict.fromkeys((own, *TARGETS))
        for r in ranks
    ]


def _fitting(
    base: Recipe, shapes: Sequence[Settings], progress: Progress, workers: Workers | None = None
) -> tuple[list[Settings], list[str]]:
    """Return those that this model and this machine can train, and a sentence about each of the others."""
    at_once = trials_at_once(workers, len(shapes))
    first, found, left_out = prepare(base, progress, at_once=at_once), [], list[str]()
    for settings in shapes:
        try:
            prepare(with_settings(base, as_words(settings)), progress, like=first, at_once=at_once)
        except (RecipeError, MachineError) as error:
            left_out.append(f"{short_name(settings)} is left out: {error.problem}.")
            progress.line(left_out[-1])
        else:
            found.append(settings)
    return found, left_out


def _choose_shape(record: SweepRecord) -> tuple[Settings, str]:
    """Return the smallest adapter of those that cannot be told apart from the best, and why."""
    best, num_tried = _best(record), len(record.trials) - len(_untried(record))
    at = best.rungs[-1].step
    furthest = [
        trial
        for trial in _tied(record)
        if not trial.problem and (trial.state == "finished" or trial.rungs[-1].step == at)
    ]
    chosen = min([best, *furthest], key=_adapter_size)
    words = f"{', '.join(as_words(chosen.settings))}: "
    if chosen is best:
        words += f"the lowest held-out loss of {num_tried} adapters, {best.rungs[-1].nll:.4f} nats"
    else:
        words += f"the smallest adapter that cannot be told apart from the best one ({short_name(best.settings)})"
    return chosen.settings, f"{words}, after step {at}."


def _adapter_size(trial: TrialResult) -> int:
    """Return the trained parameters of a trial."""
    return int(read_json(RunDir(Path(trial.run)).plan)["parameters"]["trainable"])
