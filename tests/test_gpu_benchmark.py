"""The ten minutes on a GPU: its table from whatever the steps left, and all of it in tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_steps_run_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPTS / "run.sh"), "--dry-run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line for line in lines if line.get("ok") is False] == []
    assert {line["step"]: line["exit"] for line in lines if line.get("exit", "0") != "0"} == {}, done.stdout
    assert {line["case"] for line in lines if "case" in line} == {"4k", "4k-trl", "16k-recomputed", "4k-nf4"}
