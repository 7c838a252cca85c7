from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from loratune.data.rows.sources import read_rows
from loratune.data.rows.tables import Chain, HubTable, LineTable, can_open, open_table
from loratune.recipe.recipe import Source
from loratune.run.errors import DataError


def test_rows_by_number_are_the_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    lines = ['{"text": "one\u2028two"}', "", "   ", '{"text": "é😀"}\r', '{"text": "last, without a newline"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    table = LineTable(path)
    assert [table[i] for i in range(len(table))] == read_rows(Source(name=str(path)))
    assert [table[i].line for i in range(3)] == [1, 4, 5]


def test_a_folder_is_one_table(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(3)))
    table = open_table(Source(name=str(tmp_path)))
    assert [table[i].value["text"] for i in range(len(table))] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert isinstance(table, Chain)
    assert [table.which(i) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert set(table.contents) == {str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")}


def test_keys_are_equal_for_lines_that_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "a"} \n')
    keys = LineTable(path).keys.tolist()
    assert keys[0] == keys[2] != keys[1]


def test_a_line_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": \n{"text": "\xff"}\n')
    table = LineTable(path)
    with pytest.raises(DataError, match=r"broken.jsonl:2: not JSON"):
        table[1]
    with pytest.raises(DataError, match=r"broken.jsonl:3: not UTF-8: byte 0xff"):
        table[2]


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="the file is empty"):
        LineTable(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="no such file"):
        open_table(Source(name=str(tmp_path / "none.jsonl")))


def test_only_lines_without_a_weight_can_be_read_one_by_one(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json"):
        (tmp_path / name).write_text("{}\n")
    assert can_open(Source(name=str(tmp_path / "a.jsonl")))
    assert not can_open(Source(name=str(tmp_path / "a.jsonl"), weight=2))
    assert not can_open(Source(name=str(tmp_path / "b.json")))
    assert not can_open(Source(name=str(tmp_path)))


def test_a_hub_data_set_is_read_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = datasets.Dataset.from_dict({"text": ["one", "two"]})
    monkeypatch.setattr("loratune.data.rows.hub._require_hub", lambda source: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: saved)  # no Hub is reachable in tests
    table = HubTable(Source(name="some/set", config="all"))
    assert [(table[i].file, table[i].line, table[i].value) for i in range(len(table))] == [
        ("hub:some/set:all:train", 1, {"text": "one"}),
        ("hub:some/set:all:train", 2, {"text": "two"}),
    ]
    assert table.contents == {"hub:some/set:all:train": saved._fingerprint}
