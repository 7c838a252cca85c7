"""Progress in a notebook: one bar below the cell for each piece of work, and lines of text."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from loratune.cli.terminal import TerminalProgress
from loratune.run.errors import printable
from loratune.run.progress import Progress, ProgressTask

SECONDS_BETWEEN = 0.2
"""Seconds between two updates of a bar: each is a message to the browser."""


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


def progress_here() -> Progress:
    """Return a progress display for where this runs: a notebook or a terminal."""
    return NotebookProgress() if is_notebook() else TerminalProgress()


class NotebookProgress:
    """Progress of a workflow, shown below the cell of a notebook."""

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "") -> Iterator[ProgressTask]:
        bar = _Bar(name, total, unit)
        try:
            yield bar
        finally:
            bar.show()

    def line(self, text: str) -> None:
        sys.stdout.write(f"{printable(text)}\n")

    def warn(self, text: str) -> None:
        sys.stdout.write(f"! {printable(text)}\n")

    def metrics(self, record: dict[str, Any]) -> None:
        """Do nothing: the bar shows them."""

    def checkpoint(self, record: dict[str, Any], folder: Path) -> None:
        """Do nothing: checkpoints are in the run directory."""


class _Bar:
    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self._name, self._total, self._unit, self._note = name, total, unit, ""
        self._done, self._started = 0, time.monotonic()
        self._shown = self._started
        ipython: Any = importlib.import_module("IPython.display")
        self._html = ipython.HTML
        self._place = ipython.display(self._html(self.html()), display_id=True)

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done, self._note = self._done + amount, note
        if time.monotonic() - self._shown >= SECONDS_BETWEEN:
            self.show()

    def show(self) -> None:
        self._shown = time.monotonic()
        self._place.update(self._html(self.html()))

    def html(self) -> str:
        size = f' value="{self._done}" max="{self._total}"' if self._total else ""
        of = f"/{self._total:,}" if self._total is not None else ""
        seconds = time.monotonic() - self._started
        left = ""
        if self._total and 0 < self._done < self._total:
            left = f", {seconds * (self._total - self._done) / self._done:,.0f} s left"
        text = f"{self._name}: {self._done:,}{of} {self._unit} {self._note} ({seconds:,.0f} s{left})"
        return f"<progress{size}></progress> {escape(printable(' '.join(text.split())))}"
