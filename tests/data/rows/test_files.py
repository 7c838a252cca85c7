"""Files as other programs write them: arrays, separators, encodings, compression, and tables with nulls."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from loratune.data.rows.files import is_plain_lines, not_utf8, read_bytes
from loratune.data.rows.formats import to_conversations
from loratune.data.rows.row import Row, without_nested_nulls
from loratune.data.rows.sources import read_rows
from loratune.data.rows.tables import can_open
from loratune.recipe.recipe import Source
from loratune.run.errors import DataError

ROWS = [{"prompt": f"q{n}, really", "completion": f"a{n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def values(path: Path) -> list[Any]:
    return [row.value for row in read_rows(Source(name=str(path)))]


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_rows(Source(name=str(path)))
    return caught.value


# ---- arrays


@pytest.mark.parametrize(
    ("text", "problem", "line", "column"),
    [
        ('[{"a": 1}]\n[{"a": 2}]\n', "the array has ended", 2, 1),
        ('[{"a": 1}], {"a": 2}]', "the array has ended", 1, 11),
        ('[{"a": 1}]\n\n  x', "the array has ended", 3, 3),
        ('[{"a": 1} {"a": 2}]', "a comma is missing", 1, 11),
        ('[\n{"a": 1}\n{"a": 2}\n]', "a comma is missing", 3, 1),
        ('[{"a": 1},]', "Expecting value", 1, 11),
        ('[{"a": 1},, {"a": 2}]', "Expecting value", 1, 11),
        ('[, {"a": 1}]', "Expecting value", 1, 2),
        ('[{"a": 1}', "Expecting value", 1, 10),
    ],
)
def test_an_array_is_one_complete_array(tmp_path: Path, text: str, problem: str, line: int, column: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    error = refusal(path)
    assert problem in error.problem
    assert (error.line, f"at column {column}:" in error.problem) == (line, True)


@pytest.mark.parametrize("text", ['[{"a": 1} , {"a": 2}]\n', ' [\n{"a": 1},\n{"a": 2}\n]\n\n', '[{"a":1},{"a":2}]'])
def test_a_complete_array_is_read_whole(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert values(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_called_jsonl_is_called_an_array(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS, indent=indent))
    error = refusal(path)
    assert "is a JSON array, not one JSON object per line" in error.problem
    assert error.fix == "rename it to rows.json"
    assert not can_open(Source(name=str(path)))


# ---- tables of text


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x0b", "\x1c", "a\r\nb", "one, two; three\tfour"])
def test_a_csv_is_split_by_its_separator_alone(tmp_path: Path, separator: str, odd: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'prompt{separator}completion\nx{separator}"{odd}"\ny{separator}z\n', encoding="utf-8", newline="")
    assert values(path) == [{"prompt": "x", "completion": odd}, {"prompt": "y", "completion": "z"}]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,prompt\na,b,c\n")
    assert "two columns are called prompt" in refusal(path).problem


# ---- encodings and compression

MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-8": codecs.BOM_UTF8,
}


@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / name
    text = LINES if name.endswith("jsonl") else "prompt;completion\nä;ö\n"
    path.write_bytes(MARKS[encoding] + text.encode(encoding))
    assert values(path) == (ROWS if name.endswith("jsonl") else [{"prompt": "ä", "completion": "ö"}])
    assert is_plain_lines(path) == (name.endswith("jsonl") and encoding == "utf-8")


def test_other_encodings_get_the_conversion_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.encode("utf-16-le"))
    assert "iconv -f utf-16le" in refusal(path).fix
    path.write_bytes('{"prompt": "é"}'.encode("latin1"))
    assert "iconv -f latin1" in refusal(path).fix
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xff\x00a\x00".decode()
    assert "utf-16" in not_utf8(path, 1, b"\xff\x00a\x00", caught.value).fix


def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    with pa.output_stream(str(tmp_path / "rows.jsonl.zst"), compression="zstd") as stream:
        stream.write(LINES.encode())
    for suffix in ("gz", "zst"):
        path = tmp_path / f"rows.jsonl.{suffix}"
        assert values(path) == ROWS
        assert read_bytes(path) == LINES.encode()
        assert not can_open(Source(name=str(path)))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    assert "cannot read" in refusal(tmp_path / "bad.jsonl.gz").problem


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("One.\n\nTwo.\n")
    assert values(tmp_path / "notes.txt") == [{"text": "One.\n\nTwo.\n"}]


# ---- storage is not meaning


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def called(name: str, **arguments: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Go"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        ],
        "tools": [
            tool("rain", city={"type": "string"}),
            tool("add", a={"type": "number", "minimum": 0}, b={"type": "number"}),
        ],
    }


DATA = [called("rain", city="Oslo"), called("add", a=1, b=2), called("rain", city="Bergen", days=[1, 2])]
NESTED = called("add", a=1, b=2, more={"x": [{"y": 2}, {"z": "a"}]})


def conversations(rows: list[Row]) -> list[Any]:
    good, bad = to_conversations([Row(file="a", line=row.line, value=row.value) for row in rows], "messages")
    assert not bad
    return good


@pytest.mark.parametrize("storage", ["parquet", "arrow", "json text", "exported", "saved", "messages as text"])
def test_the_same_rows_say_the_same_in_every_storage(tmp_path: Path, storage: str) -> None:
    import datasets

    rows = DATA if storage == "exported" else [*DATA, NESTED]  # nobody can tell a null below an argument from a value
    expected = conversations([Row(file="a", line=n, value=row) for n, row in enumerate(rows, start=1)])
    table = pa.Table.from_pylist(rows)
    path = tmp_path / "rows.parquet"
    if storage == "parquet":
        parquet.write_table(table, path)
    elif storage == "arrow":
        path = tmp_path / "rows.arrow"
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    elif storage == "json text":
        texts = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
        parquet.write_table(pa.Table.from_pylist(texts), path)
    elif storage == "messages as text":
        parquet.write_table(pa.Table.from_pylist([{k: json.dumps(v) for k, v in row.items()} for row in rows]), path)
    elif storage == "exported":  # with the nulls of the table written out
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        path = tmp_path / "saved"
        datasets.Dataset(table).save_to_disk(str(path))

    assert conversations(read_rows(Source(name=str(path)))) == expected


def test_columns_that_are_null_stay_and_keys_below_them_do_not() -> None:
    row = {"label": None, "messages": [{"content": None, "a": [None, {"b": None}]}]}
    assert without_nested_nulls(row) == {"label": None, "messages": [{"a": [None, {}]}]}
    assert without_nested_nulls(7) == 7
