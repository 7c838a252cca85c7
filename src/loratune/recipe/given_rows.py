"""Rows given from Python in place of a file: a list of dictionaries, a `datasets.Dataset`, a data frame.

They are written to a file that is named after their contents, which the recipe then names. So a run from Python is like
any other: its lock and its `recipe.yaml` say where the rows are, and `resume`, `evaluate` and `reproduce` read them
again. Giving the same rows again writes the same file again.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.recipe.sections.base import Source
from loratune.run.cache_folder import cache_dir
from loratune.run.digest import file_sha256
from loratune.run.errors import DataError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FIELDS = (("data", "train"), ("data", "eval"), ("evaluate", "forgetting"))
"""The settings that take rows."""


def rows_folder() -> Path:
    """Return the folder of files with rows that were given from Python."""
    return cache_dir() / "rows"


def with_rows_in_files(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe with the rows in them replaced by the files that hold them.

    Args:
        values: Sections with their fields; not changed.

    Raises:
        DataError: A row cannot be written; names its number.
        MachineError: The file cannot be written.
    """
    changed = dict(values)
    for section, field in FIELDS:
        part = changed.get(section)
        if isinstance(part, dict) and field in part:
            changed[section] = {**part, field: _named(part[field], f"{section}.{field}")}
    return changed


def _named(value: Any, setting: str) -> Any:
    """Return the value with the rows in it, alone or among other sources, as paths."""
    if _is_rows(value):
        return _file_of(value, setting)
    if isinstance(value, dict) and _is_rows(value.get("name")):
        return {**value, "name": _file_of(value["name"], setting)}
    if isinstance(value, list | tuple) and not all(isinstance(item, str) for item in value):
        return [_named(item, setting) for item in value]
    return value


def _is_rows(value: Any) -> bool:
    if _is_table(value):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_row, value))


def _is_table(value: Any) -> bool:
    return hasattr(value, "to_parquet") and not isinstance(value, type)


def _is_row(value: Any) -> bool:
    """Whether a dictionary is a row and not a source: a source has a name, or its names are misspelt."""
    known = Source.model_fields
    return isinstance(value, dict) and not all(
        isinstance(name, str) and difflib.get_close_matches(name, known, n=1) for name in value
    )


def _file_of(rows: Any, setting: str) -> str:
    if _is_table(rows):
        return str(_keep(".parquet", lambda path: _write_table(rows, path, setting)))
    lines = [_as_line(row, number, setting) for number, row in enumerate(rows, start=1)]
    return str(_keep(".jsonl", lambda path: path.write_text("".join(lines), encoding="utf-8")))


def _as_line(row: dict[str, Any], number: int, setting: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"row {number} of {setting} cannot be written as JSON: {error}",
            fix="use text, numbers, lists and dictionaries, or give a datasets.Dataset",
        ) from None


def _write_table(rows: Any, path: Path, setting: str) -> None:
    try:
        rows.to_parquet(path)
    except (TypeError, ValueError, ArithmeticError) as error:  # pyarrow's errors are ValueErrors and TypeErrors
        raise DataError(f"{setting} cannot be written as Parquet: {error}", fix="give a list of dictionaries") from None


def _keep(suffix: str, write: Callable[[Path], Any]) -> Path:
    """Return the path of a file that `write` wrote, named after its contents."""
    folder = rows_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            written = Path(place) / f"rows{suffix}"
            write(written)
            return written.replace(folder / f"{file_sha256(written)[:16]}{suffix}")
    except OSError as error:
        raise MachineError(
            f"cannot write the rows: {error}", file=folder, fix="set LORATUNE_CACHE to a folder on another disk"
        ) from None


def missing_rows_fix(path: Path) -> str:
    """Return what to do about a missing file of rows that were given from Python; empty for any other path."""
    if path.parent.name != rows_folder().name or len(path.stem) != 16:
        return ""
    return "these rows were given from Python: make the recipe from the same rows again, which writes the file"
