"""Sources → rows: files, folders and hub data sets. Knows nothing about chats."""

from __future__ import annotations

import bisect
import csv
import hashlib
import json
import random
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.recipe.recipe import Source
from loratune.run.errors import DataError, MachineError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
HUB_TIMEOUT_SECONDS = 6.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LOCAL_FIX = (
    "use a local file: data.train=FILE.jsonl data.eval=FILE.jsonl (also .json, .parquet, .csv, or a folder); "
    "or, if it was loaded here before, set HF_HUB_OFFLINE=1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record of a source, before anything is known about its meaning."""

    file: str
    """The file, or `hub:ID[:CONFIG]:SPLIT`."""
    line: int
    """The line of a text file, the record's number in any other; from 1."""
    value: Any
    """The record; normally a dictionary."""


def read_rows(source: Source, *, seed: int = 42) -> list[Row]:
    """Read every row of a source, and repeat or sample the rows by the source's weight.

    Args:
        source: A file, a folder, or a hub data set.
        seed: Decides which rows a fractional weight picks.

    Raises:
        DataError: The file is missing, empty, not UTF-8, or not what its name says; file and line are named.
        MachineError: The hub does not answer within ten seconds, and the data set is not in the local cache.
    """
    rows = _read_local(source) if is_local(source) else _read_hub(source)
    if not rows:
        raise DataError(
            "there are no rows in it",
            file=source.name,
            fix="the file is empty; give a file with rows",
        )
    return _weigh(rows, source.weight, seed)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Name → its last part, or as many of the last parts as tell it from the others."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    count = dict.fromkeys(parts, 1)
    for name, own in parts.items():
        while count[name] < len(own) and any(
            other[-count[name] :] == own[-count[name] :] for key, other in parts.items() if key != name
        ):
            count[name] += 1
    return {name: "/".join(own[-count[name] :]) for name, own in parts.items()}


def is_local(source: Source) -> bool:
    """Whether the source is a file or a folder (existing, or clearly meant as one), not the id of a hub data set."""
    name = source.name
    if name.lower().endswith(SUFFIXES) or name.startswith(("/", "./", "../", "~")) or not _HUB_ID.fullmatch(name):
        return True
    return Path(name).exists()


def hash_files(source: Source) -> dict[str, str]:
    """The SHA-256 of each file of a local source.

    Raises:
        DataError: A file is missing or cannot be read.
    """
    return {str(path): hashlib.sha256(_read_bytes(path)).hexdigest() for path in local_files(source)}


def hash_rows(rows: list[Row]) -> dict[str, str]:
    """The SHA-256 of the rows of a hub data set, under its name."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.value, sort_keys=True, default=str).encode())
    return {rows[0].file: digest.hexdigest()}


def _weigh(rows: list[Row], weight: float, seed: int) -> list[Row]:
    """Weight 2.25 is every row twice, and a quarter of the rows once more."""
    repeats, fraction = divmod(weight, 1)
    extra = round(fraction * len(rows))
    if not repeats:
        extra = max(1, extra)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), extra))  # noqa: S311 - no secret
    return rows * int(repeats) + [rows[index] for index in chosen]


def local_files(source: Source) -> list[Path]:
    """The files of a local source, in a fixed order."""
    path = Path(source.name).expanduser()
    if not path.exists():
        raise DataError("no such file or folder", file=source.name, fix="check the path in data.train or data.eval")
    if path.is_file():
        _refuse_hub_settings(source)
        if path.suffix.lower() not in SUFFIXES:
            what = f"of the unknown kind {path.suffix}" if path.suffix else "without a suffix"
            raise DataError(f"a file {what}", file=source.name, fix=f"known are {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in SUFFIXES and not _hidden(f, path))
    if source.config is not None:
        raise DataError(f"config is {source.config}, but a folder has none", file=source.name, fix="name its subfolder")
    if source.split is not None:
        files = [f for f in files if f.stem.startswith(source.split) or f.parent.name == source.split]
    if not files:
        what = f"of split {source.split} " if source.split else ""
        raise DataError(f"no data files {what}in this folder", file=source.name, fix=f"it needs {', '.join(SUFFIXES)}")
    return files


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _refuse_hub_settings(source: Source) -> None:
    for name in ("config", "split"):
        if getattr(source, name) is not None:
            raise DataError(
                f"{name} is {getattr(source, name)}, but a file has none",
                file=source.name,
                fix=f"remove {name}; it belongs to hub data sets",
            )


def _read_local(source: Source) -> list[Row]:
    rows: list[Row] = []
    for path in local_files(source):
        rows.extend(_READERS[path.suffix.lower()](path))
    return rows


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", file=path, fix="check the permissions") from None


def _read_text(path: Path) -> str:
    """The file as text; a byte order mark is dropped."""
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad = data[error.start]
        fix = f"convert it: iconv -f latin1 -t utf-8 {path.name}"
        raise DataError(f"not UTF-8: byte 0x{bad:02x}", file=path, line=line, fix=fix) from None
    if not text.strip():
        raise DataError("the file is empty", file=path, fix="give a file with rows")
    return text


def parse_line(path: Path, number: int, line: str) -> Any:
    """The record on a line of JSON lines.

    Raises:
        DataError: It is not JSON.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        shown = line if len(line) <= 60 else f"{line[:57]}..."
        fix = "each line of a .jsonl file is one complete JSON object"
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}: {shown!r}", file=path, line=number, fix=fix
        ) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(path, number, error) from None


def _unreadable_json(path: Path, line: int, error: Exception) -> DataError:
    """JSON that is well formed but not for Python: a number of thousands of digits, or a thousand levels of lists."""
    return DataError(f"not readable JSON: {error}", file=path, line=line, fix="correct this row, or remove it")


def _read_jsonl(path: Path) -> list[Row]:
    # split, not splitlines: JSON strings may hold U+2028 and its like, which splitlines would cut at.
    lines = enumerate(_read_text(path).split("\n"), start=1)
    file = str(path)
    return [Row(file=file, line=n, value=parse_line(path, n, line)) for n, line in lines if line.strip()]


def _read_json(path: Path) -> list[Row]:
    """A list of records, one record, or, as many files named .json are, one record per line."""
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
    """The records of `{"data": [...]}`, whatever the key, if that is all there is."""
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
    """The items of a JSON array, each with the line it starts on."""
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
    # pyarrow loads slowly, and most runs read JSON lines.
    import pyarrow as pa
    from pyarrow import parquet

    try:
        values = parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise DataError(f"not Parquet: {error}", file=path, fix="write it again, or give a .jsonl file") from None
    return [Row(file=str(path), line=number, value=value) for number, value in enumerate(values, start=1)]


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = _read_text(path).splitlines(keepends=True)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
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
            f"not CSV: {error}", file=path, line=line, fix="quote fields that hold quotes or commas"
        ) from None
    return rows


def _check_columns(path: Path, line: int, record: dict[str | Any, Any]) -> None:
    if None in record or None in record.values():
        problem = "more fields than columns" if None in record else "fewer fields than columns"
        raise DataError(f"not CSV: {problem}", file=path, line=line, fix="quote fields that hold commas or line ends")


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}


def _read_hub(source: Source) -> list[Row]:
    place, table = hub_table(source)
    return [Row(file=place, line=number, value=value) for number, value in enumerate(table, start=1)]


def hub_table(source: Source) -> tuple[str, Any]:
    """How a hub data set is named in messages, and its rows as a `datasets.Dataset`.

    Raises:
        DataError: There is none of this name, config and split.
        MachineError: The hub does not answer, and the data set is not in the local cache.
    """
    # `datasets` takes a second to import, and only hub sources need it.
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    split = source.split or "train"
    _require_hub(source)
    try:
        table = datasets.load_dataset(source.name, source.config, split=split)
    except DatasetNotFoundError as error:
        raise DataError(
            f"no such data set: {error}", file=source.name, fix="check the id; log in if it is gated"
        ) from None
    except ValueError as error:
        raise DataError(f"cannot load: {error}", file=source.name, fix="check config and split") from None
    except (OSError, HfHubHTTPError) as error:
        raise _unreachable(source, str(error)) from None
    return ":".join(part for part in ("hub", source.name, source.config, split) if part), table


def hub_class_names(source: Source, column: str) -> list[str]:
    """The names of the integers in a column of a hub data set, in their order; none where they have none."""
    features = hub_table(source)[1].features
    names: list[str] = list(getattr(features.get(column), "names", None) or ())
    return names


def hub_has_split(source: Source, split: str) -> bool:
    """Whether a hub data set has a split of this name.

    Raises:
        MachineError: The hub does not answer within ten seconds.
    """
    import datasets

    _require_hub(source)
    try:
        return split in datasets.get_dataset_split_names(source.name, source.config)
    except (OSError, ValueError):
        return False


def _require_hub(source: Source) -> None:
    """Ask once and briefly: `datasets` itself retries for half a minute before it gives up.

    With HF_HUB_OFFLINE it looks in its cache only, and answers at once.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not hub_answers():
        raise _unreachable(source, f"{constants.ENDPOINT} does not answer")


def hub_answers(seconds: float = HUB_TIMEOUT_SECONDS) -> bool:
    """Whether the hub answers at all within so many seconds."""
    from huggingface_hub import constants

    done = threading.Event()
    thread = threading.Thread(target=_ask_hub, args=(constants.ENDPOINT, done), daemon=True)
    thread.start()
    thread.join(seconds)  # name resolution has no timeout of its own
    return done.is_set()


def _ask_hub(endpoint: str, done: threading.Event) -> None:
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - the hub's own address
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS / 2).close()  # noqa: S310
    except urllib.error.HTTPError:
        done.set()  # any answer will do
    except OSError:
        return
    done.set()


def _unreachable(source: Source, reason: str) -> MachineError:
    problem = f"cannot load data set {source.name} from the Hugging Face hub: {reason}"
    return MachineError(problem, fix=_LOCAL_FIX)
