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
