"""torchrun gets the command line, and its failures become exit codes. Real processes:
tests/invariants/test_processes.py."""

from __future__ import annotations

import os
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from loratune.cli import torchrun


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments that torchrun is run with."""
    runs: list[Any] = []
    monkeypatch.setattr(torchrun, "run", runs.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return runs


def test_the_same_command_runs_in_each_process(given: list[Any]) -> None:
    assert torchrun.run_torchrun(2, ["train", "recipe.yaml", "--json"]) == 0
    (arguments,) = given
    assert (arguments.nproc_per_node, arguments.module, arguments.training_script) == ("2", True, "loratune")
    assert arguments.training_script_args == ["train", "recipe.yaml", "--json"]
    assert int(os.environ["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)


@pytest.mark.parametrize(("exitcode", "expected"), [(3, 3), (-9, 137)])
def test_the_exit_code_is_that_of_the_process_that_failed_first(
    exitcode: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_arguments: Any) -> None:
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="<N/A>")
        raise ChildFailedError("loratune", {0: failure})

    monkeypatch.setattr(torchrun, "run", fail)
    assert torchrun.run_torchrun(2, ["train", "recipe.yaml"]) == expected
