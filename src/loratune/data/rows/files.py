"""Files → rows: JSON Lines, JSON, Parquet, CSV and TSV, each row with its line."""

from __future__ import annotations

import bisect
import codecs
import csv
import json
import re
import sys
from typing import TYPE_CHECKING, Any

from loratune.data.rows.row import Row
from loratune.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def read_bytes(path: Path) -> bytes:
    """Return the contents of a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", file=path, fix="check the permissions") from None


def _read_text(path: Path) -> str:
    """Return the file as text, without a byte order mark."""
    data = read_bytes(path)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad = data[error.start]
        fix = f"convert it: iconv -f latin1 -t utf-8 {path.name}"
        raise DataError(f"not UTF-8: byte 0x{bad:02x}", file=path, line=line, fix=fix) from None
    if not text.strip():
        raise DataError("the file is empty", file=path, fix="provide a file with rows")
    return text


def parse_line(path: Path, number: int, line: str) -> Any:
    """Parse one line of a JSON Lines file.

    Raises:
        DataError: It is not JSON.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        shown = line if len(line) <= 60 else f"{line[:57]}..."
        fix = "each line of a .jsonl file must be one complete JSON object"
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}: {shown!r}", file=path, line=number, fix=fix
        ) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(path, number, error) from None


def _unreadable_json(path: Path, line: int, error: Exception) -> DataError:
    """Report well-formed JSON that Python cannot read: a number of thousands of digits, a thousand levels of lists."""
    return DataError(f"unreadable JSON: {error}", file=path, line=line, fix="correct or remove this row")


def _read_jsonl(path: Path) -> list[Row]:
    # split, not splitlines: JSON strings may contain U+2028 and the like, where splitlines would cut.
    lines = enumerate(_read_text(path).split("\n"), start=1)
    file = str(path)
    return [Row(file=file, line=n, value=parse_line(path, n, line)) for n, line in lines if line.strip()]


def _read_json(path: Path) -> list[Row]:
    """Read a list of records, one record, or one record per line, as in many files named .json."""
    text = _read_text(path)
    start = len(text) - len(text.lstrip())
    if text[start] == "[":
        return list(_array_items(path, text, start))
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", file=path, line=error.lineno, fix="check this line") from None
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(path, 1, error) from None
    if text[end:].strip():
        return _read_jsonl(path)
    rows = _single_list(value)
    return (
        [Row(file=str(path), line=1, value=item) for item in rows]
        if rows
        else [Row(file=str(path), line=1, value=value)]
    )


def _single_list(value: Any) -> list[Any] | None:
    """Return the records of `{"data": [...]}`, whatever the key, if the file has nothing else."""
    if isinstance(value, dict) and len(value) == 1:
        (items,) = value.values()
        if (
            isinstance(items, list)
            and items
            and isinstance(items[0], dict)
            and "role" not in items[0]
            and "from" not in items[0]
        ):
            return items
    return None


def _array_items(path: Path, text: str, start: int) -> Iterator[Row]:
    """Yield the items of a JSON array, each with the line it starts on."""
    newlines = [match.start() for match in re.finditer("\n", text)]
    decoder = json.JSONDecoder()
    skip = re.compile(r"[\s,]*")
    position = start + 1
    while True:
        blank = skip.match(text, position)
        assert blank is not None
        position = blank.end()
        line = bisect.bisect_left(newlines, position) + 1
        if position < len(text) and text[position] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            fix = "the file starts with [, so it must be one complete JSON array"
            raise DataError(f"not JSON: {error.msg}", file=path, line=error.lineno, fix=fix) from None
        except (ValueError, RecursionError) as error:
            raise _unreadable_json(path, line, error) from None
        yield Row(file=str(path), line=line, value=value)


def _read_parquet(path: Path) -> list[Row]:
    # pyarrow is slow to import, and most runs read JSON Lines.
    import pyarrow as pa
    from pyarrow import parquet

    try:
        values = parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise DataError(f"not Parquet: {error}", file=path, fix="write the file again, or use a .jsonl file") from None
    return [Row(file=str(path), line=number, value=value) for number, value in enumerate(values, start=1)]


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = _read_text(path).splitlines(keepends=True)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(lines[0])
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    rows: list[Row] = []
    line = 2  # a quoted field may span lines: a record starts after the line where the last one ended
    try:
        for record in reader:
            _check_columns(path, line, record)
            rows.append(Row(file=str(path), line=line, value=record))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"not CSV: {error}", file=path, line=line, fix="quote fields that contain quotes or commas"
        ) from None
    return rows


def _delimiter(header: str) -> str:
    """Return what separates the columns: a comma, unless the header has none and one of the others."""
    unquoted = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in ",;\t|" if mark in unquoted), ",")


def _check_columns(path: Path, line: int, record: dict[str | Any, Any]) -> None:
    if None in record or None in record.values():
        problem = "more fields than columns" if None in record else "fewer fields than columns"
        raise DataError(
            f"not CSV: {problem}", file=path, line=line, fix="quote fields that contain commas or line breaks"
        )


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
"""File suffix → the function that reads such a file."""
