"""Random access to the rows of sources too large for memory: JSON Lines files and Hub datasets.

A table knows where each row is and reads it on demand, even in a process that was forked from this one.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from loratune.data.rows.files import is_plain_lines, not_utf8, parse_line
from loratune.data.rows.hub import hub_table, is_saved
from loratune.data.rows.row import Row, without_nested_nulls
from loratune.data.rows.sources import is_local, local_files
from loratune.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.recipe.recipe import Source


class RowTable(Protocol):
    """Rows by number, from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    @property
    def contents(self) -> dict[str, str]:
        """Name of each file or dataset → a fingerprint of its rows."""

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        """A hash of each row as it is written; empty if unknown."""


def can_open(source: Source) -> bool:
    """Whether the rows of a source can be read one by one, all with the same weight.

    Raises:
        DataError: The file or folder is missing.
    """
    if source.weight != 1:
        return False
    if not is_local(source):
        return True
    return not is_saved(Path(source.name).expanduser()) and all(map(is_plain_lines, local_files(source)))


def open_table(source: Source) -> RowTable:
    """Open the rows of a source for which `can_open` is true.

    Raises:
        DataError: A file cannot be read, or has no rows.
        MachineError: The Hub does not answer.
    """
    if not is_local(source):
        return HubTable(source)
    return Chain([LineTable(path) for path in local_files(source)])


class LineTable:
    """A JSON Lines file. It is read once to index its lines, which takes 24 bytes of memory per row.

    Args:
        path: The file.

    Raises:
        DataError: The file cannot be read, or is empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        digest, position = hashlib.sha256(), 0
        starts, lengths, lines, keys = array("q"), array("i"), array("i"), array("Q")
        try:
            with path.open("rb", buffering=2**20) as stream:
                for number, line in enumerate(stream, start=1):
                    digest.update(line)
                    if text := line.strip():
                        starts.append(position)
                        lengths.append(len(line))
                        lines.append(number)
                        keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()))
                    position += len(line)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror}", file=path, fix="check the permissions") from None
        if not starts:
            raise DataError("the file is empty", file=path, fix="provide a file with rows")
        self._starts, self._lengths, self._lines = starts, lengths, lines
        self.keys = np.frombuffer(keys, dtype=np.uint64)
        self.contents = {str(path): digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Row:
        """Return a row.

        Raises:
            DataError: The line is not UTF-8, or not JSON.
        """
        line = self._lines[number]
        data = os.pread(self._descriptor, self._lengths[number], self._starts[number])
        try:
            text = data.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(self._path, line, data, error) from None
        return Row(file=str(self._path), line=line, value=parse_line(self._path, line, text))


class HubTable:
    """A Hub dataset, stored on this disk as memory-mapped Arrow files."""

    def __init__(self, source: Source) -> None:
        self._place, self._rows = hub_table(source)
        self.contents = {self._place: str(self._rows._fingerprint)}
        self.keys = np.empty(0, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return Row(file=self._place, line=number + 1, value=without_nested_nulls(self._rows[number]))


class Chain:
    """Several tables, concatenated."""

    def __init__(self, tables: Sequence[RowTable]) -> None:
        self._tables = tables
        self._starts = [0, *accumulate(len(table) for table in tables)]
        self.contents = {name: digest for table in tables for name, digest in table.contents.items()}
        known = all(len(table.keys) for table in tables)
        self.keys = np.concatenate([table.keys for table in tables]) if known else np.empty(0, dtype=np.uint64)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> Row:
        which = self.which(number)
        return self._tables[which][number - self._starts[which]]

    def which(self, number: int) -> int:
        """Return the number of the table that has this row."""
        return bisect_right(self._starts, number) - 1
