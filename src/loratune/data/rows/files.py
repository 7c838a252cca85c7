"""Files → rows: JSON Lines, JSON, Parquet, Arrow, CSV, TSV, Excel and plain text, each row with its line.

Text files may be compressed (.gz, .zst), and in UTF-16 or UTF-32 if they start with a byte order mark.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import io
import json
import re
import sys
from typing import TYPE_CHECKING, Any

from loratune.data.rows.excel import read_excel
from loratune.data.rows.json_text import DECODER, parse_json
from loratune.data.rows.row import Row, without_nested_nulls
from loratune.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
"""Byte order mark → encoding. UTF-32's begins with UTF-16's."""
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def read_bytes(path: Path) -> bytes:
    """Return the contents of a file, decompressed.

    Raises:
        DataError: It cannot be read.
    """
    try:
        if path.suffix.lower() not in _COMPRESSIONS:
            return path.read_bytes()
        import pyarrow as pa

        with pa.input_stream(str(path), compression=_COMPRESSIONS[path.suffix.lower()]) as stream:
            return bytes(stream.read())
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot read: {reason}", file=path, fix="check the file and its permissions") from None


def is_plain_lines(path: Path) -> bool:
    """Whether a file is JSON Lines in UTF-8, so that each line can be read by itself.

    Raises:
        DataError: It cannot be read.
    """
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return False
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", file=path, fix="check the permissions") from None
    return not start.startswith(tuple(mark for mark, _ in _ENCODINGS)) and not start.lstrip().startswith(b"[")


def not_utf8(path: Path, line: int, data: bytes, error: UnicodeDecodeError) -> DataError:
    """Report a file, or a line of it, that is not UTF-8."""
    encoding = "utf-16" if data.count(b"\0") > len(data) // 4 else "latin1"
    return DataError(
        f"not UTF-8: byte 0x{data[error.start]:02x}",
        file=path,
        line=line,
        fix=f"convert it: iconv -f {encoding} -t utf-8 {path.name}",
    )


def _read_text(path: Path) -> str:
    """Return the file as text, without a byte order mark."""
    data = read_bytes(path)
    encoding = next((name for mark, name in _ENCODINGS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise not_utf8(path, data.count(b"\n", 0, error.start) + 1, data, error) from None
    if "\0" in text[:100] and text.count("\0") > len(text) // 4:
        raise DataError(
            "not UTF-8, but probably UTF-16 without a byte order mark",
            file=path,
            fix=f"convert it: iconv -f utf-16le -t utf-8 {path.name}",
        )
    if not text.strip():
        raise DataError("the file is empty", file=path, fix="provide a file with rows")
    return text


def parse_line(path: Path, number: int, line: str) -> Any:
    """Parse one line of a JSON Lines file.

    Raises:
        DataError: It is not JSON.
    """
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        shown = line if len(line) <= 60 else f"{line[:57]}..."
        fix = "each line of a .jsonl file must be one complete JSON object"
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}: {shown!r}", file=path, line=number, fix=fix
        ) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(path, number, error) from None


def _unreadable_json(path: Path, line: int, error: Exception) -> DataError:
    """Report JSON that means nothing here: a key twice, a number of thousands of digits, a thousand levels of lists."""
    return DataError(f"unreadable JSON: {error}", file=path, line=line, fix="correct or remove this row")


def _read_jsonl(path: Path) -> list[Row]:
    text = _read_text(path)
    if text.lstrip().startswith("["):
        raise DataError(
            "the file is a JSON array, not one JSON object per line",
            file=path,
            line=1,
            fix=f"rename it to {path.name.replace('.jsonl', '.json').replace('.ndjson', '.json')}",
        )
    # split, not splitlines: JSON strings may contain U+2028 and the like, where splitlines would cut.
    lines = enumerate(text.split("\n"), start=1)
    file = str(path)
    return [Row(file=file, line=n, value=parse_line(path, n, line)) for n, line in lines if line.strip()]


def _read_json(path: Path) -> list[Row]:
    """Read a list of records, one record, or one record per line, as in many files named .json."""
    text = _read_text(path)
    start = len(text) - len(text.lstrip())
    if text[start] == "[":
        return list(_array_items(path, text, start))
    try:
        value, end = DECODER.raw_decode(text, start)
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
    """Yield the items of a JSON array, each with the line it starts on.

    Raises:
        DataError: It is not one complete array, with a comma between any two items and nothing after it.
    """
    newlines = [match.start() for match in re.finditer("\n", text)]
    position, first = start + 1, True
    while True:
        position = _after_blanks(text, position)
        if not first and text[position : position + 1] == ",":
            position = _after_blanks(text, position + 1)
        elif not first and text[position : position + 1] not in ("]", ""):
            raise _not_an_array(path, text, position, "a comma is missing")
        elif text[position : position + 1] == "]":
            break
        line = bisect.bisect_left(newlines, position) + 1
        try:
            value, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _not_an_array(path, text, error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise _unreadable_json(path, line, error) from None
        yield Row(file=str(path), line=line, value=value)
        first = False
    after = _after_blanks(text, position + 1)
    if after < len(text):
        raise _not_an_array(path, text, after, "the array has ended, and text follows it")


_BLANKS = re.compile(r"\s*")


def _after_blanks(text: str, position: int) -> int:
    found = _BLANKS.match(text, position)
    assert found is not None
    return found.end()


def _not_an_array(path: Path, text: str, position: int, problem: str) -> DataError:
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    shown = text[position : position + 30]
    return DataError(
        f"not JSON: {problem} at column {column}: {shown!r}",
        file=path,
        line=line,
        fix="the file starts with [, so it must be one complete JSON array; JSON Lines (.jsonl) can be joined with cat",
    )


def _read_parquet(path: Path) -> list[Row]:
    # pyarrow is slow to import, and most runs read JSON Lines.
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise DataError(f"not Parquet: {error}", file=path, fix="write the file again, or use a .jsonl file") from None
    return _table_rows(path, table)


def _read_arrow(path: Path) -> list[Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as stream:
            try:
                table = pa.ipc.open_stream(stream).read_all()
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(stream).read_all()
            return _table_rows(path, table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"not Arrow: {error}", file=path, fix="write the file again, or use a .jsonl file") from None


def _table_rows(path: Path, table: Any) -> list[Row]:
    try:
        values = table.to_pylist(maps_as_pydicts="strict")
    except ValueError as error:
        raise DataError(f"a column cannot be read: {error}", file=path, fix="write it as JSON text") from None
    return [Row(file=str(path), line=n, value=without_nested_nulls(value)) for n, value in enumerate(values, start=1)]


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = _read_text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    rows: list[Row] = []
    line = 2  # a quoted field may span lines: a record starts after the line where the last one ended
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"two columns are called {twice}", file=path, line=1, fix="rename one of them")
        for record in reader:
            _check_columns(path, line, record)
            rows.append(Row(file=str(path), line=line, value=record))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"not CSV: {error}", file=path, line=line, fix="quote fields that contain quotes or separators"
        ) from None
    return rows


def _delimiter(path: Path, text: str) -> str:
    """Return what separates the columns: the first of comma, semicolon, tab and bar that the header has."""
    if path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv"):
        return "\t"
    header = text.lstrip("\r\n").split("\n", 1)[0]
    return next((mark for mark in ",;\t|" if mark in re.sub('"[^"]*"', "", header)), ",")


def _read_document(path: Path) -> list[Row]:
    """Read a plain text file as one document."""
    return [Row(file=str(path), line=1, value={"text": _read_text(path)})]


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
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".xlsx": read_excel,
    ".txt": _read_document,
}
"""File suffix → the function that reads such a file."""
