"""Several workers take trials: which are under way at once, and that the order of their ends decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratune.planning import auto
from loratune.run.progress import NO_PROGRESS
from loratune.run.records.files import read_record
from loratune.run.records.sweep import SweepPlanRecord, TrialLosses
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.legs import Legs
from loratune.workflows.search.rungs import run_sweep
from loratune.workflows.search.shared_base import SharedBase
from loratune.workflows.search.trials import Trial, run_seconds
from loratune.workflows.search.workers import Lanes, trials_at_once
from tests.workflows.search.test_rungs import plan_of, stand_in

LOSSES = {1: 1.0, 2: 0.5, 3: 0.7, 4: 0.9}


class Backwards:
    """Workers of which the one that began last ends first, and which write what they are told to measure."""

    def __init__(self, size: int, seconds: float = 30.0) -> None:
        self.size, self.most, self.begun, self.seconds = size, 0, list[tuple[int, int]](), seconds
        self._under_way: list[tuple[Trial, int]] = []

    @contextmanager
    def on(self, folder: SweepDir, trials: Sequence[Trial]) -> Iterator[None]:
        self.folder, self.trials = folder, trials
        yield
        assert not self._under_way, "what was begun is waited for"

    def submit(self, trial: Trial, rung: int) -> None:
        self._under_way.append((trial, rung))
        self.begun.append((trial.number, rung))
        self.most = max(self.most, len(self._under_way))

    def result(self) -> tuple[int, TrialLosses]:
        trial, rung = self._under_way.pop()
        stand_in(self.folder, trial.number, *[LOSSES[trial.number]] * (rung + 1), ends=rung == 2)
        path = self.folder.losses(trial.number, rung)
        values = read_record(path, TrialLosses).model_copy(update={"seconds": self.seconds})
        path.write_text(values.model_dump_json(), encoding="utf-8")
        return trial.number, read_record(path, TrialLosses)


def make(tmp_path: Path, at_once: int = 1) -> tuple[SweepDir, SweepPlanRecord, list[Trial], Legs]:
    folder = SweepDir.create(tmp_path / "sweep", overwrite=False)
    trials = [stand_in(folder, number) for number in LOSSES]
    for trial in trials:
        trial.run.is_complete = True  # type: ignore[misc] - a stand-in
    plan = plan_of(trials)
    return folder, plan, trials, Legs(folder, plan, SharedBase(), NO_PROGRESS, at_once)


@pytest.mark.parametrize(("size", "most"), [(1, 1), (3, 3), (9, 4)])
def test_as_many_trials_are_under_way_as_there_are_workers(tmp_path: Path, size: int, most: int) -> None:
    folder, plan, trials, legs = make(tmp_path, size)
    workers = Backwards(size)
    record = run_sweep(folder, plan, trials, legs=legs, workers=workers, budget=None, progress=NO_PROGRESS)
    assert workers.most == most
    assert workers.begun == [(1, 0), (2, 0), (3, 0), (4, 0), (2, 1), (2, 2)]
    assert [(trial.number, trial.state) for trial in record.trials] == [
        (2, "finished"),
        (3, "dropped"),
        (4, "dropped"),
        (1, "dropped"),
    ]


def test_losses_come_in_the_order_of_the_trials_and_known_ones_are_not_taken_again(tmp_path: Path) -> None:
    folder, _, trials, legs = make(tmp_path)
    stand_in(folder, 2, 0.5)
    workers = Backwards(2)
    with workers.on(folder, trials):
        found, left_out = Lanes(legs, workers).take_all(trials, 0, None)
    assert list(found) == [1, 2, 3, 4]
    assert [number for number, _ in workers.begun] == [1, 3, 4]
    assert not left_out


@pytest.mark.parametrize(
    ("size", "seconds", "budget", "taken", "left"),
    [
        # By the plan, a leg to the first rung takes 25 s.
        (3, 30.0, 60.0, [1, 2, 3, 4], set()),
        (3, 30.0, 30.0, [1, 2, 3], {4}),
        (1, 30.0, 60.0, [1, 2], {3, 4}),
        # Two trials are under way when the plan says that there is no time for a third; they are quicker than planned.
        (2, 5.0, 27.0, [1, 2, 3, 4], set()),
    ],
)
def test_a_budget_is_time_by_the_clock(
    tmp_path: Path, size: int, seconds: float, budget: float, taken: list[int], left: set[int]
) -> None:
    folder, _, trials, legs = make(tmp_path, size)
    workers = Backwards(size, seconds)
    with workers.on(folder, trials):
        found, left_out = Lanes(legs, workers).take_all(trials, 0, budget)
    assert (list(found), left_out) == (taken, left)


def test_trials_that_share_a_cpu_are_slower_by_their_number_and_those_with_a_gpu_are_not() -> None:
    def prepared(device: str) -> Any:
        estimate = SimpleNamespace(time=SimpleNamespace(train_seconds=10.0))
        return SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(device=device)), estimate=estimate)

    assert [run_seconds(prepared(device), 3) for device in ("cpu", "cuda")] == [30.0, 10.0]


def test_runs_that_share_a_machine_plan_with_their_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "free_bytes", lambda device: {"cpu": 12_000, "cuda": 80_000, "mps": 12_000}[device])
    assert auto.free_device_bytes("cpu", 3) == 4_000
    assert auto.free_device_bytes("cpu") is None, "all that is free when it is asked for"
    assert auto.free_device_bytes("cuda", 3) is None, "each has a GPU of its own"
    assert auto.free_device_bytes("mps", 2) == 6_000, "they share its memory"
    workers = Backwards(3)
    assert [trials_at_once(workers, 2), trials_at_once(workers, 9), trials_at_once(None, 9)] == [2, 3, 1]
