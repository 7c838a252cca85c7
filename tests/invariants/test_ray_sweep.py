"""A sweep whose trials Ray workers take: the table and the bits of the sweep of one process, also after a loss."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[train]'")

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.records.files import read_record
from loratune.run.records.sweep import SweepRecord
from loratune.workflows.search.sweep import SweepResult
from tests.invariants.test_processes import WAIT_SECONDS, command, started, wait_for
from tests.workflows.search.test_sweep import SETTINGS, swept, table, trajectory  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow  # a cluster takes 10 s to start on two cores

RAY = ["--engine", "ray", "--workers", 2]


def sweep_command(recipe: Recipe, folder: Path) -> list[Any]:
    file = folder / "recipe.yaml"
    file.write_text(recipe.replace(train={"output_dir": str(folder / "run")}).to_yaml(), encoding="utf-8")
    return [sys.executable, "-m", "loratune", "sweep", file, *SETTINGS, "--json"]


def assert_same_sweep(found: Path, expected: SweepResult) -> None:
    record = read_record(found / "result.json", SweepRecord)
    assert table(SweepResult(folder=found, record=record)) == table(expected)
    for trial in expected.record.trials:
        alone, mine = RunDir.open(trial.run), RunDir.open(found / "trials" / Path(trial.run).name)
        assert trajectory(mine) == trajectory(alone)
        if trial.state == "finished":
            assert mine.adapter_weights.read_bytes() == alone.adapter_weights.read_bytes()


def workers_of(driver: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(driver).children(recursive=True) if "_Worker" in " ".join(p.cmdline())]


def test_two_workers_end_with_the_table_and_the_adapters_of_one_process(
    swept: tuple[Recipe, SweepResult],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe, expected = swept
    done = command([*sweep_command(recipe, tmp_path), *RAY])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"] == expected.record.best
    assert "trial 3, learning_rate=2e-2, r=2: to step 3 of 9" in done.stderr
    assert "pid=" not in done.stderr, "nothing of Ray's own"
    assert_same_sweep(tmp_path / "run-sweep", expected)
    again = command(sweep_command(recipe, tmp_path))
    assert again.returncode == 0, "one process continues what several began, and finds nothing left to do"
    assert json.loads(again.stdout)["trials"] == json.loads(done.stdout)["trials"]


@pytest.mark.parametrize(("number", "exit_code"), [(None, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_sweep_that_lost_a_worker_or_was_stopped_ends_with_the_same_table(
    swept: tuple[Recipe, SweepResult],  # noqa: F811
    tmp_path: Path,
    number: int | None,
    exit_code: int,
) -> None:
    recipe, expected = swept
    words = sweep_command(recipe, tmp_path)
    begun = tmp_path / "run-sweep" / "trials" / "02" / "metrics.jsonl"
    with started([*words, *RAY, *(["--max-failures=1"] if number is None else [])]) as process:
        wait_for(lambda: begun.is_file() and len(workers_of(process.pid)) == 2)
        workers = workers_of(process.pid)
        assert process.poll() is None, "the sweep was over before it could be stopped"
        if number is None:
            workers[0].kill()
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == exit_code, output
    if number is not None:
        assert "run the same command again to continue" in output
        assert "Traceback" not in output
        wait_for(lambda: not any(worker.is_running() for worker in workers))
        assert command([*words, *RAY]).returncode == 0
    assert_same_sweep(tmp_path / "run-sweep", expected)


def test_a_lost_worker_is_told_where_none_may_fail(
    swept: tuple[Recipe, SweepResult],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe, _ = swept
    with started([*sweep_command(recipe, tmp_path), *RAY]) as process:
        begun = tmp_path / "run-sweep" / "trials" / "02" / "metrics.jsonl"
        wait_for(lambda: begun.is_file() and len(workers_of(process.pid)) == 2)
        for worker in workers_of(process.pid):
            worker.kill()
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 1, output
    assert "its worker was lost" in output
    assert "Traceback" not in output
