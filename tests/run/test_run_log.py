"""What a run's `log.txt` keeps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loratune.run import run_log
from loratune.run.errors import RunError
from loratune.run.progress import NO_PROGRESS
from loratune.run.run_log import RunLog


def test_lines_warnings_and_the_error_are_kept_with_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "SHORTEST_TASK", 0.0)
    monkeypatch.setenv("MY_API_KEY", "a-long-secret")
    file = tmp_path / "log.txt"

    def work() -> None:
        with RunLog(NO_PROGRESS) as kept:
            kept.line("before there is a folder")
            assert not file.exists()
            kept.begin(file)
            kept.warn("two\nlines")
            with kept.task("reading", 2000, "rows") as task:
                task.advance(2000)
            kept.metrics({"step": 1})
            kept.line("key a-long-secret")
            raise RunError("it failed", fix="do it again")

    with pytest.raises(RunError):
        work()
    lines = file.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    assert [line[21:] for line in lines] == [
        "before there is a folder",
        "! two",
        "lines",
        "reading: 2,000 rows, 0 s",
        "key •••",
        "RunError: it failed",
        "  fix: do it again",
    ]


def test_a_log_goes_on_and_one_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    for text in ("one", "two"):
        with RunLog(NO_PROGRESS, file) as log:
            log.line(text)
    assert [line[21:] for line in file.read_text().splitlines()] == ["one", "two"]
    RunLog(NO_PROGRESS, tmp_path).line("a folder is no file")


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.run.processes.is_main", lambda: False)
    RunLog(NO_PROGRESS, tmp_path / "log.txt").line("from another process")
    assert not (tmp_path / "log.txt").exists()
