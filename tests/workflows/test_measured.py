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
from loratune.run.progress import NoProgress
from loratune.training import loss
from loratune.workflows.assess import explain_out_of_memory
from loratune.workflows.measured import RunTimer, step_totals
from loratune.workflows.plan import plan
from loratune.workflows.result import RunResult
from loratune.workflows.train import train
from tests.model.kernels.varlen import SIGNATURES, pretend_gpu


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
    monkeypatch.delitem(sys.modules, "loratune.__main__", raising=False)  # another test's, of which runpy would warn
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("loratune.__main__", run_name="__main__")
    assert not stop.value.code
    assert "Usage" in capsys.readouterr().out


class Told(NoProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_examples_that_are_not_packed_are_told_once_with_their_cost_and_recorded(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "obstacle", lambda model: "a state would leak")
    told = Told()
    run = train(tiny_recipe(train__epochs=1, train__token_budget=500), progress=told).run
    (words,) = [words for words in told.warnings if "a state would leak" in words]
    assert words.startswith("one example at a time: a state would leak; a forward pass has ")
    assert words.endswith("tokens on average, where packed examples fill up to 500")
    plan = read_json(run.plan)
    assert plan["packing"] == {"packed": True, "why_unpacked": ""}  # by the model's own structure
    assert plan["measured"]["packing"] == {
        "packed": False,
        "why_unpacked": "one example at a time: a state would leak",
        "slow_attention": "",
    }


def test_attention_outside_of_the_fastest_kernel_is_told_and_recorded(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, SIGNATURES["torch 2.11"], any_type=False)
    told = Told()
    run = train(tiny_recipe(train__epochs=1, model__dtype="float32"), progress=told).run
    (words,) = [words for words in told.warnings if "flash attention" in words]
    assert "flash attention has no float32" in words
    assert read_json(run.plan)["measured"]["packing"]["slow_attention"] == "flash attention has no float32"


def test_a_run_of_stock_trl_is_not_packed(tiny_recipe: Callable[..., Recipe]) -> None:
    record = plan(tiny_recipe(train__engine="trl")).as_plan()
    assert record["packing"] == {"packed": False, "why_unpacked": "train.engine is trl"}
