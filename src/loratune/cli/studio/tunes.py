"""What `loratune tune` has found, also while it runs: its two sweeps, and in the end what it chose and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.cli.studio.sweeps import SweepSoFar, TrialRow, read_or_damaged
from loratune.run.errors import RecipeError, RunError
from loratune.run.records.files import read_record
from loratune.run.records.sweep import TuneRecord
from loratune.workflows.search.folder import SweepDir, TuneDir
from loratune.workflows.search.settings import short_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One of the two sweeps.

    Attributes:
        title: What is tried.
        folder: Its folder.
        sweep: How far it is.
    """

    title: str
    folder: Path
    sweep: SweepSoFar


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSoFar:
    """What the files of a `loratune tune` hold at one moment.

    Attributes:
        state: `starting`, `failed`, `running`, `stopped`, `finished` or `damaged`.
        summary: The settings that were chosen, or how far it is, in a sentence.
        reasons: Why these settings; empty before they are chosen.
        stages: The sweeps that have begun.
    """

    state: str
    summary: str
    reasons: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()

    @property
    def trials(self) -> list[TrialRow]:
        """The trials of the sweeps that have begun."""
        return [trial for stage in self.stages for trial in stage.sweep.trials]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A sweep or a `loratune tune` in the list of the runs.

    Attributes:
        verb: `sweep` or `tune`.
        folder: Its folder.
        found: How far it is.
    """

    verb: str
    folder: Path
    found: SweepSoFar | TuneSoFar


def read_tune(folder: TuneDir, *, works: bool = False) -> TuneSoFar:
    """Read what `loratune tune` has found, also while it runs or after it was stopped.

    Args:
        folder: Its folder.
        works: Whether its command runs, which may not have locked the folder yet.

    Raises:
        RecipeError: The folder is not that of a `loratune tune`.
    """
    both = {"Learning rate": folder.rates, "Rank and target modules": folder.shapes}
    # A link may lead out of the studio's folder.
    begun = {title: of for title, of in both.items() if of.plan.is_file() and not of.root.is_symlink()}
    stages = tuple(Stage(title=title, folder=of.root, sweep=read_or_damaged(of)) for title, of in begun.items())
    if not stages:
        raise RecipeError("not a folder of `loratune tune`", file=folder.root, fix="go back to the runs")
    running = works or folder.is_in_use
    if not running and folder.result.is_file():
        try:
            record = read_record(folder.result, TuneRecord)
        except RunError as error:
            return TuneSoFar(state="damaged", summary=f"{folder.result.name}: {error.problem}", stages=stages)
        summary = f"Chosen: {short_name(record.settings)}"
        return TuneSoFar(state="finished", summary=summary, reasons=record.reasons, stages=stages)
    summary = f"{stages[-1].title}: {stages[-1].sweep.summary}"
    return TuneSoFar(state="running" if running else "stopped", summary=summary, stages=stages)


def begun_tune(*, is_running: bool) -> TuneSoFar:
    """Return one whose command has not planned the first trials yet, or has failed before it did."""
    if is_running:
        return TuneSoFar(state="starting", summary="Preparing the data …")
    return TuneSoFar(state="failed", summary="The command ended before the first trial.")


def find_searches(sweeps: Sequence[Path], within: Path) -> Iterator[Search]:
    """Yield the searches that these sweeps are, those of one `loratune tune` in that folder together."""
    tunes: set[TuneDir] = set()
    for root in sweeps:
        around = TuneDir.around(root)
        if around in tunes:
            continue
        try:
            if around is None or not around.root.is_relative_to(within):
                yield Search(verb="sweep", folder=root, found=read_or_damaged(SweepDir(root)))
            else:
                tunes.add(around)
                yield Search(verb="tune", folder=around.root, found=read_tune(around))
        except RecipeError:  # it was deleted meanwhile
            continue
