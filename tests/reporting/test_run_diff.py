from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from loratune.recipe.recipe import Recipe
from loratune.reporting.run_diff import diff, difference_table
from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import RunError
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def run(tiny_recipe: MakeRecipe) -> RunDir:
    return train(tiny_recipe(train__epochs=1)).run


def test_a_copy_of_a_run_does_not_differ(run: RunDir, tmp_path: Path) -> None:
    assert diff(run, RunDir(Path(shutil.copytree(run.root, tmp_path / "copy")))) == []


def test_settings_data_mask_and_results_are_told_apart(
    run: RunDir, tiny_recipe: MakeRecipe, chat_files: tuple[Path, Path], tmp_path: Path
) -> None:
    masked = train(tiny_recipe(train__epochs=1, data__train_on="last", train__output_dir=str(tmp_path / "last"))).run
    found = {(item.group, item.name): item for item in diff(run, masked)}
    assert found["settings", "data.train_on"].first == "assistant"
    assert found["settings", "data.train_on"].second == "last"
    assert ("mask", "train mask") in found
    assert ("data", "train tokens") not in found, "the tokens are the same, only their labels are not"
    assert ("data", "train supervised_tokens") in found
    assert ("results", "loss of the last step") in found
    assert not {group for group, _ in found} & {"model", "template", "versions", "adapter", "machine"}

    rows = write_jsonl(tmp_path / "other.jsonl", [conversation(i) for i in range(1, 21)])
    other = train(tiny_recipe(train__epochs=1, data__train=str(rows), train__output_dir=str(tmp_path / "other"))).run
    found = {(item.group, item.name): item for item in diff(run, other)}
    assert ("data", "train tokens") in found
    assert found["data", f"train file {rows}"].first is None
    assert ("data", f"train file {chat_files[0]}") in found


def test_model_template_versions_and_machine_are_compared(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(Path(shutil.copytree(run.root, tmp_path / "copy")))
    lock = read_json(other.lock)
    lock["inputs"]["model"]["config.json"] = "0" * 64
    lock["inputs"]["template"] = "1" * 64
    lock["versions"]["torch"] = "9.9"
    lock["machine"]["threads"] = 99
    write_json(other.lock, lock)
    groups = ["model", "template", "versions", "machine"]
    found: Any = diff(run, other)
    assert f"<td>versions</td><td>torch</td><td>{torch.__version__}</td><td>9.9</td>" in found._repr_html_()
    assert [(item.group, item.name) for item in found] == list(
        zip(groups, ["config.json", "chat template", "torch", "threads"], strict=True)
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(difference_table(diff(run, other), run, other))
    page = console.export_text()
    assert all(word in page for word in ("111111111111…", "9.9", "versions", "copy"))


def test_a_run_without_lock_is_named(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file"):
        diff(run, RunDir(tmp_path))
