"""From the held-out losses of the trials to the ranked table, the sensitivity of each setting, and the summary."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.evaluation.record import paired_differences
from loratune.workflows.search.halving import level_for, mean_loss
from loratune.workflows.search.settings import short_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from loratune.evaluation.record import NllPair
    from loratune.run.directory import Record
    from loratune.run.records.sweep import TrialLosses
    from loratune.workflows.search.settings import Settings

FEW_ROWS = 20
"""Held-out rows below which a bootstrap interval is too narrow to be trusted."""
MAX_SENTENCES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSoFar:
    """A trial as far as it was taken.

    Attributes:
        number: Its number, from 1.
        settings: Setting → value.
        run: Its run directory.
        rungs: Its losses at the rungs that it reached; the last one may be a failure.
    """

    number: int
    settings: Settings
    run: str
    rungs: tuple[TrialLosses, ...]

    @property
    def measured(self) -> list[TrialLosses]:
        """The rungs with losses."""
        return [rung for rung in self.rungs if rung.losses]

    @property
    def problem(self) -> str:
        """Why it failed."""
        return next((rung.problem for rung in self.rungs if rung.problem), "")

    def rank(self) -> tuple[float, float, float, int]:
        """Return a key by which the best comes first: failed last, then the furthest, then the lowest loss."""
        if not self.measured:
            return (2, 0, math.inf, self.number)
        return (bool(self.problem), -len(self.measured), mean_loss(self.measured[-1].losses), self.number)


def rank_trials(trials: Sequence[TrialSoFar], waiting: Collection[int]) -> Record:
    """Return `state`, `best`, `level`, `trials`, `sensitivity` and `sentences` of a sweep's record.

    Args:
        trials: The trials.
        waiting: Numbers of the trials for which there was no time.
    """
    ranked = sorted(trials, key=TrialSoFar.rank)
    best = ranked[0] if ranked[0].measured and not ranked[0].problem else None
    level = level_for(len(trials))
    differences = {} if best is None else _differences(best, ranked[1:], level)
    rows = [
        {
            "number": trial.number,
            "run": trial.run,
            "settings": trial.settings,
            "state": _state(trial, waiting),
            "rungs": [
                {"step": rung.step, "nll": mean_loss(rung.losses), "seconds": rung.seconds}
                for place, rung in enumerate(trial.measured)
                if not place or rung is not trial.measured[place - 1]
            ],
            "to_best": differences.get(trial.number),
            **({"problem": trial.problem} if trial.problem else {}),
        }
        for trial in ranked
    ]
    return {
        "state": "time is up" if waiting else "finished",
        "best": best and best.number,
        "level": level,
        "num_examples": len(best.measured[0].losses) if best else 0,
        "trials": rows,
        "sensitivity": sensitivity(trials),
        "sentences": [] if best is None else list(_sentences(best, ranked, differences)),
    }


def _state(trial: TrialSoFar, waiting: Collection[int]) -> str:
    if trial.problem:
        return "failed"
    if trial.rungs and trial.rungs[-1].is_final:
        return "finished"
    return "waiting" if trial.number in waiting else "dropped"


def _differences(best: TrialSoFar, others: Iterable[TrialSoFar], level: float) -> dict[int, Record]:
    """Return trial → difference to the best one, where the trial got to."""
    found: dict[int, Record] = {}
    groups: dict[int, list[TrialSoFar]] = {}
    for trial in others:
        groups.setdefault(len(trial.measured), []).append(trial)
    for length, group in groups.items():
        if not length:
            continue
        at = min(length, len(best.measured)) - 1  # a failed trial may have got further
        losses: list[Sequence[NllPair]] = [best.measured[at].losses, *(trial.measured[at].losses for trial in group)]
        for trial, interval in zip(group, paired_differences(losses, level=level), strict=True):
            found[trial.number] = {"step": trial.measured[at].step, **interval.as_dict()}
    return found


def sensitivity(trials: Sequence[TrialSoFar]) -> list[Record]:
    """Return how much each setting matters: the mean loss of the trials with each value, at the first rung.

    There all trials are in. A setting with many values, as from a range, is taken in thirds.
    """
    first = [(trial.settings, mean_loss(trial.rungs[0].losses)) for trial in trials if trial.measured]
    if not first:
        return []
    effects: list[Record] = []
    for name in first[0][0]:
        groups: dict[str, list[float]] = {}
        of_value = _groups([settings[name] for settings, _ in first])
        for settings, loss in first:
            groups.setdefault(of_value[settings[name]], []).append(loss)
        values = [
            {"value": value, "nll": math.fsum(losses) / len(losses), "num_trials": len(losses)}
            for value, losses in groups.items()
        ]
        means = [math.fsum(losses) / len(losses) for losses in groups.values()]
        effects.append({"setting": name, "spread": max(means) - min(means), "values": values})
    return sorted(effects, key=lambda effect: -effect["spread"])


def _groups(values: Sequence[str]) -> dict[str, str]:
    """Return value → the group it counts to: itself, or a third of many different numbers."""
    different = list(dict.fromkeys(values))
    try:
        numbers = sorted(different, key=float)
    except ValueError:
        return {value: value for value in different}
    if 2 * len(different) <= len(values) or len(different) <= 6:
        return {value: value for value in numbers}
    bounds = [len(numbers) * third // 3 for third in range(4)]
    parts = [numbers[a:b] for a, b in itertools.pairwise(bounds)]
    return {value: f"{part[0]} to {part[-1]}" for part in parts for value in part}


def _is_tie(difference: Record) -> bool:
    return bool(difference["low"] <= 0 <= difference["high"])


def _sentences(best: TrialSoFar, ranked: Sequence[TrialSoFar], differences: dict[int, Record]) -> Iterable[str]:
    name, last = short_name(best.settings), best.measured[-1]
    yield f"{name} is best: held-out loss {mean_loss(last.losses):.4f} nats per token after step {last.step}."
    beaten = [trial for trial in ranked if trial.number in differences and differences[trial.number]["low"] > 0]
    tied = [trial for trial in ranked if trial.number in differences and _is_tie(differences[trial.number])]
    ahead = [trial for trial in ranked if trial.number in differences and differences[trial.number]["high"] < 0]
    if tied:
        names = "; ".join(short_name(trial.settings) for trial in tied[:MAX_SENTENCES])
        more = f" and {len(tied) - MAX_SENTENCES} more" if len(tied) > MAX_SENTENCES else ""
        yield f"It cannot be told apart from {names}{more}."
    for trial in ahead:
        found = differences[trial.number]
        yield f"{short_name(trial.settings)} was ahead of it at step {found['step']}, but was not trained further."
    for trial in beaten[:MAX_SENTENCES]:
        found = differences[trial.number]
        half = (found["high"] - found["low"]) / 2
        yield f"It beats {short_name(trial.settings)} by {found['value']:.3g} ± {half:.2g} nats (step {found['step']})."
    if len(beaten) > MAX_SENTENCES:
        yield f"It beats {len(beaten) - MAX_SENTENCES} more, by more than the interval too."
    failed = [trial for trial in ranked if trial.problem]
    if failed:
        yield f"Failed: {'; '.join(short_name(trial.settings) for trial in failed)}."
    if len(last.losses) < FEW_ROWS:
        yield (
            f"The intervals are based on {len(last.losses)} held-out rows, which are few: they are probably too "
            "narrow. Hold out more (data.eval)."
        )
