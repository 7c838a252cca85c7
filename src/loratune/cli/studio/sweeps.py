"""A sweep as far as it is: the same ranks, intervals and charts while it runs as at its end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.reporting.blocks import Page, PageSection, Paragraph
from loratune.reporting.sweep_page import sweep_page
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError, RunError
from loratune.run.records.base import parse
from loratune.run.records.files import read_record
from loratune.run.records.sweep import SweepPlanRecord, SweepRecord, TrialLosses
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.results import TrialSoFar, rank_trials
from loratune.workflows.search.settings import short_name

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """A trial in the list of a sweep's trials.

    Attributes:
        number: Its number, from 1.
        settings: Its settings in a few words.
        state: `finished`, `dropped`, `failed`, `running`, `paused` or `waiting`.
        has_begun: Whether there is a run directory.
    """

    number: int
    settings: str
    state: str
    has_begun: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSoFar:
    """What the files of a sweep hold at one moment.

    Attributes:
        state: `starting`, `failed`, `running`, `stopped`, `finished`, `time is up` or `damaged`.
        summary: The result, or how far it is, in a sentence.
        trials: The trials, in the order of their numbers.
        page: The sections of its page; of one that was measured nowhere yet none.
    """

    state: str
    summary: str
    trials: tuple[TrialRow, ...]
    page: Page


def read_sweep(folder: SweepDir) -> SweepSoFar:
    """Read a sweep, also one that runs or was stopped.

    Raises:
        RecipeError: The folder is not a sweep.
        RunError: Its plan is damaged.
    """
    if not folder.plan.is_file():
        raise RecipeError("not a sweep", file=folder.root, fix="go back to the runs")
    plan = read_record(folder.plan, SweepPlanRecord)
    running, problem, record = RunDir(folder.root).is_in_use, "", None
    if not running and folder.result.is_file():
        try:
            record = read_record(folder.result, SweepRecord)
        except RunError as error:  # the losses that it was made from are still there
            problem = f"{folder.result.name}: {error.problem}"
    state = "running" if running else "stopped" if record is None else record.state
    if record is None:
        record = _so_far(folder, plan, running=running)
    page = _page(folder, record, state, problem)
    states = {trial.number: trial.state for trial in record.trials} if record is not None else {}
    trials = tuple(
        TrialRow(
            number=number,
            settings=short_name(settings),
            state=states.get(number) or _state(folder, number, "waiting", running=running),
            has_begun=folder.trial(number).lock.is_file(),
        )
        for number, settings in enumerate(plan.trials, 1)
    )
    done = sum(row.state in ("finished", "dropped", "failed") for row in trials)
    summary = page.lead or f"{done} of {len(trials)} trials are done"
    if page.lead and state in ("running", "stopped"):
        summary = f"So far: {page.lead}"
    return SweepSoFar(state=state, summary=summary, trials=trials, page=page)


def begun_sweep(folder: SweepDir, *, is_running: bool) -> SweepSoFar:
    """Return a sweep whose command has not planned the trials yet, or has failed before it did."""
    state = "starting" if is_running else "failed"
    words = {"starting": "Preparing the data …", "failed": "The command ended before the first trial."}
    page = Page(title=f"Sweep {folder.root.name}", lead="", badge=state, footer="")
    return SweepSoFar(state=state, summary=words[state], trials=(), page=page)


def _page(folder: SweepDir, record: SweepRecord | None, state: str, problem: str) -> Page:
    if record is None or not record.trials:
        page = Page(title=f"Sweep {folder.root.name}", lead="", badge=state, footer="")
    else:
        page = replace(sweep_page(record), badge=state)
    if not problem:
        return page
    note = Paragraph(text=f"{problem}. What follows is read from the losses of the trials.", tone="warning")
    return replace(page, sections=(PageSection(name="missing", title="Missing data", blocks=(note,)), *page.sections))


def _so_far(folder: SweepDir, plan: SweepPlanRecord, *, running: bool) -> SweepRecord | None:
    """Rank the trials by the losses that were measured up to now; None before the first."""
    files = [folder.plan, *(path for path, *_ in _loss_files(folder, plan))]
    stamps = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    record = _ranked(folder.root, stamps)
    if record is None:
        return None
    ranked = tuple(
        trial.model_copy(update={"state": _state(folder, trial.number, trial.state, running=running)})
        for trial in record.trials
    )
    return record.model_copy(update={"trials": ranked, "best": None})


@lru_cache(maxsize=16)
def _ranked(root: Path, stamps: tuple[tuple[str, int, int], ...]) -> SweepRecord | None:  # noqa: ARG001 - for the cache
    """Rank the trials, whose intervals take a while; the stamps are those of the files that are read here."""
    folder = SweepDir(root)
    plan = read_record(folder.plan, SweepPlanRecord)
    rungs: dict[int, list[TrialLosses]] = {number: [] for number in range(1, len(plan.trials) + 1)}
    for path, number, _ in _loss_files(folder, plan):
        rungs[number].append(read_record(path, TrialLosses))
    trials = [
        TrialSoFar(number=number, settings=settings, run=str(folder.trial(number).root), rungs=tuple(rungs[number]))
        for number, settings in enumerate(plan.trials, 1)
    ]
    if not any(trial.measured for trial in trials):
        return None
    values = {**rank_trials(trials, set(rungs)), "rungs": list(plan.rungs)}
    places = {"folder": str(root), "recipe": None, "page": str(folder.page)}
    return parse(SweepRecord, {**values, **places})


def _loss_files(folder: SweepDir, plan: SweepPlanRecord) -> list[tuple[Path, int, int]]:
    """Return the files of losses that there are, each with its trial and its rung."""
    files = (
        (folder.losses(number, rung), number, rung)
        for number in range(1, len(plan.trials) + 1)
        for rung in range(len(plan.rungs))
    )
    return [(path, number, rung) for path, number, rung in files if path.is_file()]


def _state(folder: SweepDir, number: int, state: str, *, running: bool) -> str:
    """Return the state of a trial; the losses that were measured do not know of one that is on its way."""
    run = folder.trial(number)
    if state != "waiting" or not run.lock.is_file():
        return state
    return "running" if running and run.is_in_use else "paused"


def read_or_damaged(folder: SweepDir) -> SweepSoFar:
    """Read a sweep; a damaged one says what is damaged.

    Raises:
        RecipeError: The folder is not a sweep.
    """
    try:
        return read_sweep(folder)
    except RunError as error:
        page = Page(title=f"Sweep {folder.root.name}", lead="", badge="damaged", footer="")
        file = folder.plan if error.file is None else Path(error.file)
        return SweepSoFar(state="damaged", summary=f"{file.name}: {error.problem}", trials=(), page=page)
