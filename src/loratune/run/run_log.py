"""`log.txt` of a run: the lines that the terminal showed, each with its time, and the error that ended the run."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

from loratune.run import processes
from loratune.run.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from loratune.run.progress import Progress, ProgressTask

SHORTEST_TASK = 2.0
"""Seconds of a piece of work from which its end is worth a line."""


class RunLog:
    """Progress that is shown by another listener and also written to a file, even with `--quiet`.

    Lines from before the file has a place are kept until then. Only the first of several processes writes.

    Args:
        progress: Shows the progress.
        file: The file; None until `begin` is called.
    """

    def __init__(self, progress: Progress, file: Path | None = None) -> None:
        self._progress, self._file = progress, file
        self._waiting: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.note(f"{type(error).__name__}: {error}")

    def begin(self, file: Path) -> None:
        """Write to this file from now on, starting with the earlier lines."""
        self._file = file
        waiting, self._waiting = self._waiting, []
        self._write(waiting)

    def note(self, text: str) -> None:
        """Write a line to the file only."""
        now = datetime.now().astimezone()
        lines = [f"{now:%Y-%m-%d %H:%M:%S}  {line}\n" for line in printable(text).splitlines()]
        self._waiting.extend(lines) if self._file is None else self._write(lines)

    def _write(self, lines: list[str]) -> None:
        if self._file is None or not lines or not processes.is_main():
            return
        with suppress(OSError), self._file.open("a", encoding="utf-8") as stream:  # a full disk stops more than a log
            stream.writelines(lines)

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "") -> Iterator[ProgressTask]:
        started = time.monotonic()
        with self._progress.task(name, total, unit) as task:
            yield task
        if (seconds := time.monotonic() - started) >= SHORTEST_TASK:
            of = f"{total:,} {unit}, " if total else ""
            self.note(f"{name}: {of}{seconds:,.0f} s")

    def line(self, text: str) -> None:
        self._progress.line(text)
        self.note(text)

    def warn(self, text: str) -> None:
        self._progress.warn(text)
        self.note(f"! {text}")

    def metrics(self, record: dict[str, Any]) -> None:
        self._progress.metrics(record)

    def checkpoint(self, record: dict[str, Any], folder: Path) -> None:
        self._progress.checkpoint(record, folder)
