"""Sources → rows: which files or Hub dataset a source means, their hashes, and their weights. Knows nothing about
chats."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.data.rows.excel import sheets_left_out
from loratune.data.rows.files import READERS, read_bytes
from loratune.data.rows.folders import COMPRESSED, data_suffix, select_files
from loratune.data.rows.hub import is_saved, read_hub, read_saved
from loratune.recipe.given_rows import missing_rows_fix
from loratune.run.errors import DataError

if TYPE_CHECKING:
    from loratune.data.rows.row import Row
    from loratune.recipe.recipe import Source

SUFFIXES = tuple(READERS)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def read_rows(source: Source, *, seed: int = 42) -> list[Row]:
    """Read every row of a source, and repeat or sample the rows by the source's weight.

    Args:
        source: A file, a folder, or a Hub dataset.
        seed: Seed of the choice of rows under a fractional weight.

    Raises:
        DataError: The file is missing, empty, not UTF-8, or not of the type its name says; names file and line.
        MachineError: The Hub does not answer, and the dataset is not in the local cache.
    """
    rows = _read_local(source) if is_local(source) else read_hub(source)
    if not rows:
        raise DataError("the source has no rows", file=source.name, fix="provide a file with rows")
    return _weigh(rows, source.weight, seed)


def is_local(source: Source) -> bool:
    """Whether the source is a file or a folder (existing, or clearly meant as one), not the id of a Hub dataset."""
    name = source.name
    if (
        name.lower().endswith((*SUFFIXES, *COMPRESSED))
        or name.startswith(("/", "./", "../", "~"))
        or not _HUB_ID.fullmatch(name)
    ):
        return True
    return Path(name).exists()


def hash_files(source: Source) -> dict[str, str]:
    """Return the SHA-256 of each file of a local source.

    Raises:
        DataError: A file is missing or cannot be read.
    """
    folder = Path(source.name).expanduser()
    if is_saved(folder):
        digest = hashlib.sha256()
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            digest.update(path.read_bytes())
        return {str(folder): digest.hexdigest()}
    return {str(path): hashlib.sha256(read_bytes(path)).hexdigest() for path in local_files(source)}


def hash_rows(rows: list[Row]) -> dict[str, str]:
    """Return the SHA-256 of the rows of a Hub dataset, under its name."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.value, sort_keys=True, default=str).encode())
    return {rows[0].file: digest.hexdigest()}


def _weigh(rows: list[Row], weight: float, seed: int) -> list[Row]:
    """Repeat and sample rows: weight 2.25 is every row twice, and a random quarter of them a third time."""
    repeats, fraction = divmod(weight, 1)
    extra = round(fraction * len(rows))
    if not repeats:
        extra = max(1, extra)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), extra))  # noqa: S311 - no secret
    return rows * int(repeats) + [rows[index] for index in chosen]


def local_files(source: Source) -> list[Path]:
    """Return the files of a local source, in a fixed order.

    Raises:
        DataError: There are none.
    """
    path = Path(source.name).expanduser()
    if not path.exists():
        fix = missing_rows_fix(path) or "check the path (in a recipe, that of data.train or data.eval)"
        raise DataError("no such file or folder", file=source.name, fix=fix)
    if path.is_file():
        _refuse_hub_settings(source)
        if data_suffix(path) not in SUFFIXES:
            what = f"unsupported file type {path.suffix}" if path.suffix else "a file without a suffix"
            fix = f"supported types are {', '.join(SUFFIXES)}"
            if path.suffix.lower() in (".xls", ".ods"):
                fix = "save it as .xlsx, or as CSV (UTF-8)"
            raise DataError(what, file=source.name, fix=fix)
        return [path]
    return select_files(path, source.split, SUFFIXES, source.config).files


def files_left_out(source: Source) -> list[str]:
    """Return the files of a folder that are not read, each with the reason, and the sheets of Excel files."""
    path = Path(source.name).expanduser()
    if not is_local(source) or is_saved(path):
        return []
    sheets = [
        f"{file} (its sheet {name}: only the first sheet is read)"
        for file in local_files(source)
        if data_suffix(file) == ".xlsx"
        for name in sheets_left_out(file)
    ]
    if not path.is_dir():
        return sheets
    left_out = select_files(path, source.split, SUFFIXES, source.config).left_out
    return [*(f"{source.name.rstrip('/')}/{name}" for name in left_out), *sheets]


def _refuse_hub_settings(source: Source) -> None:
    for name in ("config", "split"):
        if getattr(source, name) is not None:
            raise DataError(
                f"{name} is {getattr(source, name)}, but a file has none",
                file=source.name,
                fix=f"remove {name}; only Hub datasets have it",
            )


def _read_local(source: Source) -> list[Row]:
    folder = Path(source.name).expanduser()
    if is_saved(folder):
        return read_saved(folder, source.split)
    rows: list[Row] = []
    for path in local_files(source):
        rows.extend(READERS[data_suffix(path)](path))
    return rows
