"""How the processes of a run communicate, and what a launcher's environment says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.run import processes
from loratune.run.errors import RecipeError

ALONE = """
import atexit
import torch.distributed
from loratune.cli.shell import command_context
from loratune.run import processes
from loratune.run.errors import DataError
atexit.register(lambda: print("connected at exit:", torch.distributed.is_initialized()))
with command_context(False, together=True):
    assert processes.gather(processes.rank()) == [0, 1]
    if processes.rank() == 1:
        raise DataError("a row that only this process sees", file="train.jsonl", line=7)
    processes.gather(None)
"""


def test_an_error_of_one_process_is_told_once_with_its_number_and_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ALONE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1, "torchrun's own, whatever the processes say"
    assert done.stderr.count("DataError") == 1
    assert "DataError process 1: train.jsonl:7: a row that only this process sees" in done.stderr
    assert "exitcode  : 3" in done.stderr, "torchrun reports it"
    assert "connected at exit: False" in done.stdout
    assert "connected at exit: True" not in done.stdout, "gloo's threads could abort the interpreter"
    assert "LostPeerError" not in done.stderr


def test_one_process_asks_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.start()
    assert (processes.rank(), processes.size(), processes.local_size(), processes.is_main()) == (0, 1, 1, True)
    assert processes.gather("value") == ["value"]
    assert not processes.is_launched()
    assert processes.first_failure(1) is None
    assert processes.launch_id() == ""


def test_srun_says_who_a_process_is_and_a_batch_script_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert not processes.is_launched()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert processes.is_launched()
    assert processes.rank() == 3
    with pytest.raises(RecipeError, match="lacks MASTER_ADDR and MASTER_PORT"):
        processes.start()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed precision \\(bf16\\)"),
        ("ACCELERATE_USE_FSDP", "true", "configured for FSDP"),
        ("WORLD_SIZE", "two", "not a number"),
    ],
)
def test_what_a_launcher_must_not_decide_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=words):
        processes.start()


@pytest.mark.parametrize(
    ("visible", "local_rank", "own"),
    [(None, 1, "1"), ("", 1, ""), ("4,5", 1, "5"), ("7", 1, "7"), ("GPU-a,GPU-b", 0, "GPU-a")],
)
def test_each_process_sees_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, local_rank: int, own: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    processes._choose_gpu(local_rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(RecipeError, match="process 2 of this machine has no GPU"):
        processes._choose_gpu(2)
