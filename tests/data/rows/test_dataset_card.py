"""A folder whose `README.md` declares its splits is read as the Hub reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.data.rows.dataset_card import declared_splits
from loratune.data.rows.folders import select_files
from loratune.data.rows.sources import SUFFIXES, read_rows
from loratune.recipe.recipe import Source
from loratune.run.errors import DataError

FILES = ("a.jsonl", "b.jsonl", "held/c.jsonl", "notes.csv")


def folder_with(folder: Path, block: str, *names: str) -> Path:
    for name in names or FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"prompt": "{name}", "completion": "b"}}\n')
    (folder / "README.md").write_text(f"---\nlicense: mit\n{block}---\n# Data\n")
    return folder


def read(folder: Path, split: str | None = None, config: str | None = None) -> tuple[list[str], list[str]]:
    found = select_files(folder, split, SUFFIXES, config)
    return [str(file.relative_to(folder)) for file in found.files], found.left_out


SPLITS = """configs:
- config_name: default
  data_files:
  - split: train
    path: ["a.jsonl", "b.jsonl"]
  - split: dev
    path: held/*
"""
TWO = """configs:
- config_name: small
  data_files: a.jsonl
- config_name: large
  data_files: ["?.jsonl"]
"""


@pytest.mark.parametrize(
    ("block", "split", "config", "files"),
    [
        (SPLITS, None, None, ["a.jsonl", "b.jsonl"]),
        (SPLITS, "validation", None, ["held/c.jsonl"]),
        (SPLITS, "dev", None, ["held/c.jsonl"]),
        (TWO, None, "small", ["a.jsonl"]),
        (TWO, None, "large", ["a.jsonl", "b.jsonl"]),
        (TWO + "  default: true\n", None, None, ["a.jsonl", "b.jsonl"]),
        ("configs:\n- config_name: x\n  data_dir: held\n", None, None, ["held/c.jsonl"]),
        ("configs:\n- data_dir: held\n  data_files: ./*.jsonl\n", None, None, ["held/c.jsonl"]),
        ("", None, None, ["a.jsonl", "b.jsonl", "held/c.jsonl", "notes.csv"]),
    ],
)
def test_the_declared_files_are_read(
    block: str, split: str | None, config: str | None, files: list[str], tmp_path: Path
) -> None:
    assert read(folder_with(tmp_path, block), split, config)[0] == files


def test_every_other_file_is_named_with_the_reason(tmp_path: Path) -> None:
    assert read(folder_with(tmp_path, SPLITS))[1] == [
        "held/c.jsonl (split validation)",
        "notes.csv (not named in README.md)",
    ]


def test_splits_of_a_declared_folder_are_told_by_the_names_of_its_files(tmp_path: Path) -> None:
    names = ("data/train.jsonl", "data/test.jsonl", "data/LICENSE.md", "old.jsonl")
    folder = folder_with(tmp_path, "configs:\n- config_name: default\n  data_dir: data\n", *names)
    assert read(folder) == (
        ["data/train.jsonl"],
        ["data/test.jsonl (split test)", "old.jsonl (not named in README.md)"],
    )
    assert read(folder, split="test")[0] == ["data/test.jsonl"]


def test_rows_of_a_config_are_read_by_a_recipe(tmp_path: Path) -> None:
    source = Source(name=str(folder_with(tmp_path, TWO)), config="large")
    assert [row.value["prompt"] for row in read_rows(source)] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("block", "config", "problem"),
    [
        (TWO, None, "several configs, and none is the default"),
        (TWO, "medium", "there is no config medium"),
        ("", "small", "config is small, but a folder has none"),
        ("configs:\n- data_files: gone-*.jsonl\n", None, "no file matches 'gone-"),
        ("configs:\n- data_files: ../*.jsonl\n", None, "no file matches"),
        ("configs:\n- data_files: /etc/*\n", None, "no file matches"),
        ("configs:\n- data_files: [{split: train}]\n", None, "data_files without a path"),
        ("configs:\n- {data_files: a.jsonl, sep: ';'}\n", None, "configs: sep is not supported"),
        ("configs: yes\n", None, "configs is not a list"),
        ("configs: [\n", None, "its metadata cannot be read"),
        ("configs:\n- data_files: README.md\n", None, "a file of an unsupported type"),
    ],
)
def test_a_block_that_says_nothing_clear_is_refused(
    block: str, config: str | None, problem: str, tmp_path: Path
) -> None:
    inner = folder_with(tmp_path / "inner", block)
    (tmp_path / "outside.jsonl").write_text("{}")
    with pytest.raises(DataError, match=problem):
        read(inner, config=config)


def test_a_folder_without_a_card_declares_nothing(tmp_path: Path) -> None:
    assert declared_splits(tmp_path, None) == (None, tmp_path)
