"""One record of a source, where it was read, and why it was rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record of a source, before anything is known about its meaning."""

    file: str
    """The file, or `hub:ID[:CONFIG]:SPLIT`."""
    line: int
    """The line of a text file, or the number of the record in any other source; from 1."""
    value: Any
    """The record; normally a dictionary."""


def without_nested_nulls(row: Any) -> Any:
    """Return a row of a table without keys that are null, at any depth below its columns.

    A table gives every object of a column the keys of all of them, and fills in null: such a key is absent.
    """
    if not isinstance(row, dict):
        return row
    return {name: _without_nulls(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an example was read."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def as_record(self) -> dict[str, Any]:
        """Return file and line, as `data.json` holds them."""
        return {"file": self.file, "line": self.line}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that cannot be trained on."""

    origin: Origin
    reason: str
