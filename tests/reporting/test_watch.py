"""`loratune watch`: what it shows of a run that another process writes, and that it ends with it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.reporting.run_files import read_run
from loratune.reporting.watch import headline, show_run, sparkline, watch_view
from loratune.run.directory import RunDir, read_json

WRITER = """
import json, sys, time
from loratune.run.directory import RunDir
run, lines = RunDir.at(sys.argv[1]), [json.loads(line) for line in open(sys.argv[2])]
with run.exclusive():
    print("locked", flush=True)
    for line in lines:
        run.append_metrics(line)
        time.sleep(0.02)
    sys.stdin.readline()
"""


def view(run: RunDir, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(watch_view(read_run(run), width))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def part(finished_run: RunDir, tmp_path: Path) -> RunDir:
    """The files that a run has before its first step."""
    run = RunDir.at(tmp_path / "run")
    run.root.mkdir()
    for name in ("recipe.yaml", "data.json", "plan.json", "lock.json"):
        (run.root / name).write_bytes((finished_run.root / name).read_bytes())
    return run


def test_a_sparkline_has_a_column_per_value_and_merges_what_does_not_fit() -> None:
    assert sparkline([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert sparkline([], 10) == ""
    assert sparkline([8.0, 8.0, 0.0, 0.0], 2) == "█▁"
    assert sparkline([float("nan"), 1.0, 2.0], 5) == "▁█"


def test_a_finished_run_is_shown_with_its_numbers(finished_run: RunDir) -> None:
    shown, files = view(finished_run), read_run(finished_run)
    plan = read_json(finished_run.plan)
    total = plan["time"]["num_steps"]
    assert f"finished · step {total}/{total} · loss {files.steps[-1].loss:.4f}" in shown
    assert f"{files.held_out[-1].eval_nll:.4g} after step {total}" in shown
    assert "planned (" in shown
    assert "result" in shown
    assert "left" not in shown


def test_a_running_run_is_followed_from_another_process_until_it_ends(finished_run: RunDir, part: RunDir) -> None:
    total = read_json(part.plan)["time"]["num_steps"]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(part.root), str(finished_run.metrics)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "locked\n"
    console = Console(file=io.StringIO(), width=100)
    watcher = threading.Thread(target=show_run, args=(part, console), kwargs={"seconds": 0.05})
    watcher.start()

    def shown() -> str:
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    deadline = time.monotonic() + 60
    while f"step {total}/{total}" not in shown():
        assert watcher.is_alive(), "it ended before the run did"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lines = shown().splitlines()
    assert all("running" in line for line in lines)
    assert len(lines) > 2
    assert "evaluating" in lines[-1]  # no step is left
    writer.communicate("done\n")
    watcher.join(timeout=60)
    assert not watcher.is_alive()
    assert f"stopped · step {total}/{total}" in shown()
    assert "memory" in shown()


def test_time_left_is_that_of_the_last_steps(part: RunDir) -> None:
    plan = read_json(part.plan)
    plan["time"]["num_steps"] = 101
    part.plan.write_text(json.dumps(plan))
    line = {"step": 1, "time": 0.0, "epoch": 0.1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0}
    line |= {"num_tokens": 100, "num_supervised_tokens": 50, "tokens_per_second": 50.0, "peak_bytes": 2**30}
    with part.exclusive():
        assert headline(read_run(part)).endswith("running · step 0/101")
        part.append_metrics(line)
        assert headline(read_run(part)).endswith("step 1/101 · loss 2.0000 · 3 min 20 s of training left")
    assert "left" not in headline(read_run(part))


def test_once_prints_once_and_a_terminal_gets_one_view(finished_run: RunDir, part: RunDir) -> None:
    done = CliRunner().invoke(app, ["watch", str(part.root), "--once"])
    assert done.exit_code == 0
    assert done.stdout.startswith("run: stopped · step 0/")
    console = Console(file=io.StringIO(), force_terminal=True, width=90)
    started = time.monotonic()
    show_run(finished_run, console)
    assert time.monotonic() - started < 5
    assert "finished" in console.file.getvalue()  # type: ignore[attr-defined]
    assert CliRunner().invoke(app, ["watch", str(part.root / "nothing")]).exit_code == 2


def test_a_damaged_plan_costs_only_what_it_says(finished_run: RunDir, part: RunDir) -> None:
    part.plan.write_text('{"time": 3}')
    part.metrics.write_bytes(finished_run.metrics.read_bytes())
    shown = view(part)
    assert "peak" in shown
    assert "planned" not in shown
