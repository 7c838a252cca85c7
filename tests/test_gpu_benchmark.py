"""The ten minutes on a GPU: its table from whatever the steps left, and all of it in tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.preloaded_python import preloaded_python

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "gpu"


def table_of(folder: Path, *lines: str) -> tuple[int, str]:
    (folder / "results.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(SCRIPTS / "results_table.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "150"})
    return done.returncode, done.stdout + done.stderr


CASE = {
    "case": "4k",
    "tokens_per_second": 50_000.0,
    "planned_tokens_per_second": 60_000.0,
    "flops_per_token": 8e9,
    "peak_bytes": 3 * 2**30,
    "planned_peak_bytes": 4 * 2**30,
    "first_step_seconds": 30.0,
    "packing": {"packed": False, "why_unpacked": "a reason", "slow_attention": ""},
}
RATES = {"rates": True, "matmul_flops_per_second": 8e14}


def test_the_table_shows_what_there_is(tmp_path: Path) -> None:
    good = {"step": "4k", "exit": "0", "seconds": 3}
    check = {"what": "attention", "ok": True, "errors": [0.001, -0.002], "kernel": "varlen"}
    code, shown = table_of(tmp_path, *map(json.dumps, (RATES, CASE, check, good)))
    assert code == 0, shown
    for text in ("50,000", "60,000", "50%", "3.00", "4.00", "not packed; a reason", "0.002", "varlen"):
        assert text in shown
    assert json.loads((tmp_path / "results.json").read_text())["results"] == [RATES, CASE, check, good]


def test_what_failed_or_was_cut_off_is_said(tmp_path: Path) -> None:
    wrong = {"what": "fp8 layer", "ok": False, "error": "RuntimeError: no such kernel"}
    cut = {"step": "16k", "exit": "124", "seconds": 80}
    code, shown = table_of(tmp_path, json.dumps(CASE), json.dumps(wrong), json.dumps(cut), '{"case": "1k", "tok')
    assert code == 1
    for text in ("no such kernel", "did not end well: 16k", "checks that failed: 1", "cut off", "?"):
        assert text in shown


def test_nothing_at_all_is_a_table_too(tmp_path: Path) -> None:
    code, shown = table_of(tmp_path, json.dumps({"step": "machine", "exit": "skipped", "seconds": 0}))
    assert code == 1
    assert "did not end well: machine" in shown


STAND_IN = """#!{python}
import os, pathlib, sys, time
script, *arguments = sys.argv[1:]
if script.endswith("results_table.py"):
    os.execv(sys.executable, [sys.executable, script, *arguments])
out = pathlib.Path(os.environ["OUT"], "results.jsonl").open("a")
name = " ".join(arguments)
if name == "right":
    sys.exit(3)
if name == "waiting":
    out.write('{{"half": "a li')
    out.flush()
    os.kill(os.getpid(), 9)
if name == "resume":
    out.write('{{"what": "before the limit", "ok": true}}' + chr(10))
    out.flush()
    time.sleep(60)
print("said by", name)
out.write('{{"what": "' + name + '", "ok": true}}' + chr(10))
"""
"""In place of Python: steps that fail, die in the middle of a line, take too long, or end well."""


def run_with_stand_in(folder: Path, **environment: str) -> tuple[str, list[dict[str, object]]]:
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    given = {**os.environ, "PYTHON": str(stand_in), **environment}
    command = [str(SCRIPTS / "run.sh"), "--dry-run", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    written = json.loads((folder / "out" / "results.json").read_text())["results"]
    return done.stdout + done.stderr, written


def test_a_step_that_fails_dies_or_takes_too_long_stops_no_other(tmp_path: Path) -> None:
    shown, lines = run_with_stand_in(tmp_path, LIMIT="2")
    exits = {line["step"]: line["exit"] for line in lines if "step" in line}
    ended = {"kernels": "3", "waiting": "137", "resume": "124"}
    assert exits == {name: ended.get(name, "0") for name in exits}
    assert list(exits)[-2:] == ["answers", "selftest"]
    assert {"what": "before the limit", "ok": True} in lines, "what a step found before its limit is kept"
    for text in ("did not end well: kernels, waiting, resume", "left out a line that is cut off"):
        assert text in shown
    assert "said by case 4k" in (tmp_path / "out" / "log.txt").read_text()


def test_no_step_begins_when_the_time_is_up_and_the_table_comes_all_the_same(tmp_path: Path) -> None:
    started = time.monotonic()
    shown, lines = run_with_stand_in(tmp_path, SECONDS_IN_ALL="4")  # times 4 on a CPU, and `resume` sleeps for 60
    assert time.monotonic() - started < 40
    exits = {line["step"]: line["exit"] for line in lines if "step" in line}
    assert exits["resume"] == "124", "cut to what is left"
    assert exits["memory-runs-out"] == exits["selftest"] == "skipped"
    assert "did not end well" in shown


def test_results_are_whole_after_every_step(tmp_path: Path) -> None:
    """Whatever ends the script, `results.json` has what was found up to the step before."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    given = {**os.environ, "PYTHON": str(stand_in)}
    script = subprocess.Popen(
        [str(SCRIPTS / "run.sh"), "--dry-run", str(tmp_path / "out")],
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert script.stdout is not None
    for line in script.stdout:
        if line.startswith("== resume"):
            break
    os.killpg(script.pid, 9)
    script.communicate()
    names = [line.get("step") for line in json.loads((tmp_path / "out" / "results.json").read_text())["results"]]
    assert [name for name in names if name] == ["machine", "kernels", "losses", "waiting"]


def test_the_first_number_that_matters_comes_within_ten_minutes_even_if_all_before_it_use_up_their_limits() -> None:
    script = (SCRIPTS / "run.sh").read_text()
    limits = {
        name: int(limit) for name, limit in re.findall(r"^(?:measure|again)\s+(\S+)\s+(\d+)", script, re.MULTILINE)
    }
    names = list(limits)
    assert sum(limits[name] for name in names[: names.index("4k") + 1]) <= 585
    assert all(limit < 585 / 2 for limit in limits.values())


def test_wheels_are_pinned_to_the_versions_that_are_tested() -> None:
    """Their size is measured when they are fetched: `make gpu-wheels` says it."""
    wanted = [line for line in (SCRIPTS / "wheels.txt").read_text().splitlines() if line and line[0] != "#"]
    tested = (SCRIPTS.parents[1] / "constraints.txt").read_text().replace("_", "-").splitlines()
    assert len(wanted) > 20
    assert [pin for pin in wanted if pin not in tested] == []


def dry_run(script: str, folder: Path, python: Path | str) -> list[dict[str, object]]:
    """The results of all steps, none of which may fail."""
    command = [str(SCRIPTS / script), "--dry-run", str(folder)]
    given = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=given, start_new_session=True
    )
    try:
        said, _ = started.communicate()
    except BaseException:
        os.killpg(started.pid, 9)
        raise
    lines: list[dict[str, object]] = json.loads((folder / "results.json").read_text())["results"]
    assert [line for line in lines if line.get("ok") is False] == []
    log = (folder / "log.txt").read_text()
    ends = {line["step"]: line["exit"] for line in lines if "step" in line and "exit" in line}
    assert set(ends.values()) == {"0"}, said + log
    assert started.returncode == 0, said
    return lines


@pytest.mark.timeout(1200)
def test_all_steps_run_on_a_cpu(tmp_path: Path) -> None:
    imported = tmp_path / "imported.py"
    imported.write_text("import sys; sys.exit(not {'torch._dynamo', 'trl.trainer.sft_trainer'} <= set(sys.modules))")
    with preloaded_python(tmp_path) as python:
        assert subprocess.run([python, imported], check=False).returncode == 0, "each step would import them again"
        lines = dry_run("run.sh", tmp_path / "out", python)
    assert {line["case"] for line in lines if "case" in line} == {"4k", "4k-trl", "16k-recomputed", "4k-nf4"}
    checks = {str(line["what"]) for line in lines if "what" in line}
    for part in ("attention 12:2 of 128", "cross-entropy, compiled", "LoRA layer", "fp8 layer", "a CPU's bits"):
        assert any(part in check for check in checks), part
    for part in ("= stock TRL", "waits for nothing", "resumed run", "ran out of memory", "merge = adapter"):
        assert any(part in check for check in checks), part
    for key in ("profile", "attention", "chunk_rows", "answers", "rates"):
        assert any(key in line for line in lines), key


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_steps_run_with_two_processes_on_a_cpu(tmp_path: Path) -> None:
    lines = dry_run("run_multi.sh", tmp_path, sys.executable)
    together = {line["together"] for line in lines if "together" in line}
    assert together == {"small-ddp", "small-fsdp", "big-ddp", "big-fsdp"}
    assert all(line["processes"] == 2 for line in lines if "processes" in line)
    checks = {str(line["what"]) for line in lines if "what" in line}
    assert "all processes end when one is killed" in checks
    assert "sum of 4,096 numbers over 2 processes" in checks
