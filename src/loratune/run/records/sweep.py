"""The files of a sweep: what is tried, the held-out losses of each trial, and the result."""

from __future__ import annotations

from typing import Any

from loratune.run.records.base import FileRecord, Part


class SweepPlanRecord(FileRecord):
    """`sweep.json`: what a sweep tries."""

    recipe: dict[str, Any]
    """Settings that all trials share."""
    trials: tuple[dict[str, str], ...]
    """Settings of each trial: name → value as written."""
    rungs: tuple[float, ...]
    """Fractions of a run at which trials are compared."""
    dtype: str
    """Type of the frozen weights, the same for all trials."""


class TrialLosses(FileRecord):
    """`losses/TRIAL-RUNG.json`: held-out losses of a trial at a rung."""

    step: int
    """Optimizer steps taken."""
    is_final: bool
    """Whether the trial is finished."""
    losses: tuple[tuple[float, int], ...]
    """For each held-out example, the summed negative log-likelihood in nats and the number of trained tokens; empty
    after a failure."""
    seconds: float
    """Time since the previous rung, in seconds."""
    problem: str = ""
    """Why the trial failed."""


class RungResult(Part):
    """A trial at a rung."""

    step: int
    """Optimizer steps taken."""
    nll: float
    """Held-out loss: mean negative log-likelihood per trained token, in nats."""
    seconds: float
    """Time since the previous rung, in seconds."""


class TrialDifference(Part):
    """By how much a trial's held-out loss exceeds that of the best trial, on the same rows after the same share of
    steps; one that early stopping ended is compared as it ended."""

    step: int
    """Step of the trial at which they are compared."""
    value: float
    """Difference, in nats per trained token."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""


class TrialResult(Part):
    """A trial."""

    number: int
    """Number, from 1."""
    run: str
    """Run directory."""
    settings: dict[str, str]
    """Setting → value as written."""
    state: str
    """`finished`, `dropped` at a rung, `failed`, or `waiting` if the time was up."""
    rungs: tuple[RungResult, ...]
    """Its held-out losses."""
    to_best: TrialDifference | None
    """Difference to the best trial; null for the best one, or without a held-out loss."""
    problem: str = ""
    """Why it failed."""


class ValueEffect(Part):
    """What one value of a setting does, on average over the trials that have it."""

    value: str
    """The value or, for a range, a third of the range."""
    nll: float
    """Mean held-out loss of its trials at the first rung, in nats."""
    num_trials: int
    """Trials."""


class SettingEffect(Part):
    """How much a setting matters."""

    setting: str
    """Its name."""
    spread: float
    """Mean loss of its worst value minus that of its best, in nats."""
    values: tuple[ValueEffect, ...]
    """Its values."""


class SweepRecord(FileRecord):
    """`loratune sweep`: the trials, the best one first."""

    folder: str
    """Folder of the sweep."""
    state: str
    """`finished`, or `time is up`."""
    best: int | None
    """Number of the best trial; null if all failed."""
    recipe: str | None
    """Recipe with the settings of the best trial."""
    page: str
    """HTML page."""
    num_examples: int
    """Held-out examples that trials are compared on."""
    level: float
    """Confidence of each interval, 0 to 1; all of them together hold with 95 % confidence."""
    rungs: tuple[float, ...]
    """Fractions of a run at which trials were compared."""
    trials: tuple[TrialResult, ...]
    """The trials, the best first."""
    sensitivity: tuple[SettingEffect, ...]
    """Settings, the one that matters most first."""
    sentences: tuple[str, ...]
    """The result in words."""


class TuneRecord(FileRecord):
    """`loratune tune`: the settings that were chosen, and why."""

    folder: str
    """Folder of both sweeps."""
    recipe: str
    """Recipe with the chosen settings."""
    settings: dict[str, str]
    """Chosen settings."""
    reasons: tuple[str, ...]
    """Why each was chosen."""
    rates: SweepRecord
    """Learning rates, compared."""
    shapes: SweepRecord | None
    """Ranks and target modules, compared at the best rate; null if no time was left, or if no others can be trained."""
