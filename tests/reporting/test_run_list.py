"""Runs in a list, and ranked."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loratune.reporting.run_list import list_runs, ranked_table, runs_table
from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import RecipeError


@pytest.fixture
def folder(finished_run: RunDir, tmp_path: Path) -> Path:
    """A finished run, a worse one, and one whose evaluation is damaged."""
    for name in ("good", "deeper/worse", "damaged"):
        shutil.copytree(finished_run.root, tmp_path / name)
    record = read_json(tmp_path / "deeper" / "worse" / "evaluation.json")
    for name in record["tuned"]:
        sign = 1 if name in ("nll", "perplexity") else -1
        record["tuned"][name] += sign
        record["difference"][name] = {"value": sign, "low": sign - 0.1, "high": sign + 0.1}
    write_json(tmp_path / "deeper" / "worse" / "evaluation.json", record)
    (tmp_path / "damaged" / "evaluation.json").write_text("{")
    return tmp_path


def shown(table: object) -> str:
    console = Console(width=300, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_every_run_is_listed_with_its_state_and_result(folder: Path) -> None:
    listed: Any = list_runs(folder)
    assert f"<td>{folder / 'good'}</td><td>finished</td>" in listed._repr_html_()
    found = {Path(run.run).name: run for run in listed}
    assert set(found) == {"good", "worse", "damaged"}
    assert {run.state for run in found.values()} == {"finished"}
    assert found["worse"].verdict.startswith("worse: ")
    assert found["worse"].verdict.endswith(")")
    assert found["damaged"].verdict == ""
    json.dumps([run.as_dict() for run in found.values()])
    assert "worse: " in shown(runs_table(found.values()))
    with pytest.raises(RecipeError, match="no such folder"):
        list_runs(folder / "nowhere")


def test_the_best_run_comes_first(folder: Path) -> None:
    lines = shown(ranked_table([folder / "damaged", folder / "deeper" / "worse", folder / "good"])).splitlines()
    order = [name for line in lines for name in ("good", "worse", "damaged") if f" {name} " in line]
    assert order == ["good", "worse", "damaged"]


def test_runs_whose_folders_have_one_name_are_told_apart(folder: Path) -> None:
    shutil.copytree(folder / "good", folder / "deeper" / "good")
    lines = shown(ranked_table([folder / "good", folder / "deeper" / "good", folder / "damaged"])).splitlines()
    for name in (folder / "good", folder / "deeper" / "good"):
        assert sum(f" {name} " in line for line in lines) == 1
    assert any(" damaged " in line for line in lines)
