"""Totals of a run, over all the times that it was started, and what a verb returns of it."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from collections.abc import Callable

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.directory import read_json
from loratune.run.errors import MachineError
from loratune.workflows.assess import explain_out_of_memory
from loratune.workflows.measured import RunTimer, step_totals
from loratune.workflows.result import RunResult
from loratune.workflows.train import train


def test_rates_count_all_tokens_of_all_steps_and_nothing_else() -> None:
    steps = [
        {"step": 1, "num_tokens": 100, "num_supervised_tokens": 10, "tokens_per_second": 50.0},
        {"step": 1, "eval_nll": 1.0, "seconds": 99.0},
        {"step": 2, "num_tokens": 300, "num_supervised_tokens": 10, "tokens_per_second": 300.0},
    ]
    assert step_totals(steps) == {"train_seconds": 3.0, "tokens_per_second": 400 / 3}
    assert step_totals([]) == {"train_seconds": 0, "tokens_per_second": 0.0}


def test_an_interrupted_run_adds_up_its_processes(tiny_recipe: Callable[..., Recipe]) -> None:
    result = train(tiny_recipe(train__epochs=1))
    assert isinstance(result, RunResult)
    assert dataclasses.is_dataclass(result)
    run = result.run
    measured = read_json(run.plan)["measured"]
    first = RunTimer(run, "cpu")
    first.note()
    so_far = read_json(run.plan)["so_far"]
    second = RunTimer(run, "cpu")
    second.close(evaluate_seconds=5.0, packing=measured["packing"])
    record = read_json(run.plan)
    assert "so_far" not in record or record["so_far"] is None
    assert record["measured"]["packing"] == {"packed": True, "why_unpacked": "", "slow_attention": ""}
    assert record["measured"]["total_seconds"] > so_far["total_seconds"] > 0
    assert record["measured"]["train_seconds"] == measured["train_seconds"]
    evaluations = sum(line["seconds"] for line in run.read_metrics() if "eval_nll" in line)
    assert record["measured"]["evaluate_seconds"] == pytest.approx(5.0 + evaluations)
    with pytest.raises(MachineError, match="out of memory"), explain_out_of_memory(run):
        raise MemoryError
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(run):
        raise RuntimeError("another")


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["loratune", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("loratune.__main__", run_name="__main__")
    assert not stop.value.code
    assert "Usage" in capsys.readouterr().out
