"""Commands are processes of their own, and nothing is started twice."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from loratune.cli.studio.jobs import Jobs
from loratune.cli.studio.places import OWN, StudioFolder
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError, RunError


def wait_for_end(jobs: Jobs, name: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while jobs.get(name).is_running:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_same_run_is_started_once_by_any_number_of_studios(tmp_path: Path) -> None:
    places = StudioFolder.of(tmp_path)
    first, second = Jobs(places), Jobs(places)
    job = first.start(("train", "no-such.yaml"), about="__models/a", source="no-such.yaml")
    for studio in (first, second):
        with pytest.raises(RecipeError, match="already running"):
            studio.start(("resume", "__models/a"), about="__models/a")
    assert second.get(job.id).is_running
    assert second.get(job.id).state == "running"
    assert [one.id for one in second.all("__models/a")] == [job.id]
    assert second.all("__models/b") == []
    assert job.line == "loratune train no-such.yaml"

    wait_for_end(second, job.id)
    end = time.monotonic() + 5  # the exit code is written by the studio that started it
    while first.get(job.id).code is None and time.monotonic() < end:
        time.sleep(0.02)
    assert second.get(job.id).state == "failed (exit code 2)"
    assert "no-such.yaml: no such recipe" in second.output(job)


def test_a_run_that_another_shell_works_on_is_not_started(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", overwrite=False)
    jobs = Jobs(StudioFolder.of(tmp_path))
    with run.exclusive(), pytest.raises(RecipeError, match="another command is working on run"):
        jobs.start(("resume", "run"), about="run")
    assert jobs.all() == []
    with pytest.raises(RunError, match="nothing is running"):
        jobs.stop(run)


def test_a_command_whose_lock_is_free_has_ended_even_if_nobody_saw_it(tmp_path: Path) -> None:
    """As after the machine was switched off: the files say what was started, and nothing holds the lock."""
    jobs = Jobs(StudioFolder.of(tmp_path))
    own = tmp_path / OWN
    own.mkdir()
    (own / "key.lock").write_text("1-a")
    record = {"id": "1-a", "words": ["train", "r.yaml"], "about": "run", "source": "", "started": 1.0, "pid": 1}
    (own / "1-a.json").write_text(json.dumps({**record, "lock": "key.lock"}))
    (own / "damaged.json").write_text("{")
    (job,) = jobs.all()
    assert (job.is_running, job.state, jobs.output(job)) == (False, "ended", "")
    with pytest.raises(RecipeError, match="no command"):
        jobs.get("2-b")
