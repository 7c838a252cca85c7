"""Files, folders and the Hub → rows, with the line each row stands on."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from loratune.data.rows.sources import hash_files, is_local, read_rows
from loratune.recipe.recipe import Source
from loratune.run.errors import DataError, MachineError

ROWS = [{"text": "one"}, {"text": "zwei, drei"}, {"text": 'vier "fünf"\nsechs'}]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path | str, **settings: object) -> list[tuple[int, object]]:
    return [(row.line, row.value) for row in read_rows(Source(name=str(path), **settings))]  # type: ignore[arg-type]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('text\none\n"zwei, drei"\n"vier ""fünf""\nsechs"\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('text\none\nzwei, drei\n"vier ""fünf""\nsechs"\n', encoding="utf-8")

    for path in tmp_path.iterdir():
        assert [value for _, value in read(path)] == ROWS, path.name


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n\n{"a": 2}\r\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('[\n {"a": 1},\n\n {"a":\n 2}\n]\n', encoding="utf-8")
    (tmp_path / "a.csv").write_text('a\n"1\n1"\n2\n', encoding="utf-8")

    assert read(tmp_path / "a.jsonl") == [(1, {"a": 1}), (3, {"a": 2})]
    assert read(tmp_path / "a.json") == [(2, {"a": 1}), (4, {"a": 2})]
    assert read(tmp_path / "a.csv") == [(2, {"a": "1\n1"}), (4, {"a": "2"})]


def test_json_that_is_one_record_or_one_record_per_line_is_read_as_such(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "one.json").write_text(json.dumps(record), encoding="utf-8")
    jsonl(tmp_path / "lines.json", ROWS)

    assert read(tmp_path / "one.json") == [(1, record)]
    assert [value for _, value in read(tmp_path / "lines.json")] == ROWS


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one\u2028two"}])

    assert read(path) == [(1, {"text": "one\u2028two"})]


def test_a_folder_gives_its_training_files_in_order_or_those_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / ".cache").mkdir()
    jsonl(tmp_path / "train-1.jsonl", [{"n": 1}])
    jsonl(tmp_path / "train-0.jsonl", [{"n": 0}])
    jsonl(tmp_path / "test" / "a.jsonl", [{"n": 2}])
    jsonl(tmp_path / ".cache" / "a.jsonl", [{"n": 3}])
    (tmp_path / "README.md").write_text("nothing")

    assert [value["n"] for _, value in read(tmp_path)] == [0, 1]  # type: ignore[index]
    assert [value["n"] for _, value in read(tmp_path, split="train")] == [0, 1]  # type: ignore[index]
    assert [value["n"] for _, value in read(tmp_path, split="test")] == [2]  # type: ignore[index]


def test_a_weight_repeats_rows_and_samples_the_fraction_by_seed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"n": n} for n in range(100)])

    def numbers(weight: float, seed: int = 42) -> list[int]:
        return [row.value["n"] for row in read_rows(Source(name=str(path), weight=weight), seed=seed)]

    assert numbers(2) == [*range(100), *range(100)]
    assert len(numbers(0.25)) == len(set(numbers(0.25))) == 25
    assert numbers(0.25) == numbers(0.25)
    assert numbers(0.25) != numbers(0.25, seed=1)
    assert numbers(0.25) == sorted(numbers(0.25))
    assert Counter(Counter(numbers(1.25)).values()) == {1: 75, 2: 25}
    assert len(numbers(0.0001)) == 1


@pytest.mark.parametrize(
    ("name", "content", "problem", "line"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n{"a": 3}\n', "not JSON", 2),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "not UTF-8: byte 0xe9", 2),
        ("a.jsonl", b"", "empty", None),
        ("a.jsonl", b" \n\n", "empty", None),
        ("a.json", b"[]", "no rows", None),
        ("a.json", b'[\n{"a": 1},\n{"a": }\n]', "not JSON", 3),
        ("a.json", b'[{"a": 1},\n', "not JSON", 2),
        ("a.json", b'{"a": 1', "not JSON", 1),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "more fields than columns", 3),
        ("a.csv", b"a,b\n1\n", "fewer fields than columns", 2),
        ("a.csv", b"a,b\n", "no rows", None),
        ("a.parquet", b"no parquet at all", "not Parquet", None),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, problem: str, line: int | None
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError, match=problem) as caught:
        read(path)
    assert (caught.value.file, caught.value.line) == (str(path), line)


def test_a_missing_file_and_a_folder_without_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file") as caught:
        read(tmp_path / "no.jsonl")
    assert caught.value.file == str(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="no data files in this folder"):
        read(tmp_path)


def test_settings_of_hub_data_sets_are_refused_for_files(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)

    with pytest.raises(DataError, match="split is test, but a file has none"):
        read(path, split="test")
    with pytest.raises(DataError, match="config is all, but a folder has none"):
        read(tmp_path, config="all")


def test_hub_ids_and_files_are_told_apart(tmp_path: Path) -> None:
    assert not is_local(Source(name="HuggingFaceTB/smoltalk"))
    assert not is_local(Source(name="squad"))
    for name in ("missing.jsonl", "./folder", "/data", "~/data", "a/b/c", str(tmp_path)):
        assert is_local(Source(name=name)), name


def test_a_source_is_hashed_by_the_bytes_of_its_files(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    source = Source(name=str(tmp_path))
    before = hash_files(source)
    path.write_text(path.read_text("utf-8") + "\n", encoding="utf-8")

    assert list(before) == [str(path)]
    assert hash_files(source) != before


def test_an_unreachable_hub_is_reported_within_ten_seconds_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for address in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:9", "http://no.such.host.invalid"):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        start = time.monotonic()
        with pytest.raises(MachineError, match="HuggingFaceTB/smoltalk") as caught:
            read("HuggingFaceTB/smoltalk", config="all")
        assert time.monotonic() - start < 10
        assert "data.train=FILE.jsonl" in caught.value.fix
    silent.close()


def test_offline_mode_looks_in_the_cache_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    with pytest.raises(MachineError, match="HuggingFaceTB/smoltalk"):
        read("HuggingFaceTB/smoltalk", config="all")


def test_a_file_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("words")
    with pytest.raises(DataError, match=r"unsupported file type \.md") as error:
        read_rows(Source(name=str(tmp_path / "notes.md")))
    assert ".jsonl" in error.value.fix
