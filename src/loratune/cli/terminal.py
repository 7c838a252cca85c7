"""Progress for people: bars on a terminal, plain lines where there is none. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from loratune.run.errors import printable
from loratune.run.progress import ProgressTask

# Characters that move the cursor, change the title or reverse the direction of writing; tabs and line ends stay.
_CONTROLS = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {
    **{code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS},
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}
"""Characters that data must not send to a terminal → what is shown instead."""

WIDE = 130
"""Terminal columns from which a training bar shows everything."""
QUIET_SECONDS = 10.0
"""Seconds between two lines of a task when there is no terminal."""


class SafeConsole(Console):
    """A console that shows control characters from data and models as text instead of sending them to the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with control characters escaped; rich's own control codes pass."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or text.isprintable() else Segment(text.translate(_SHOWN), style)


class TerminalProgress:
    """Progress of a workflow, shown as bars or lines.

    Args:
        console: Where to print; stderr by default.

    Attributes:
        quiet: Whether only warnings are shown; the same for the whole process, as `--quiet` is.
        verbose: Whether an error is shown with where in the code it arose.
    """

    quiet: ClassVar[bool] = False
    verbose: ClassVar[bool] = False

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or SafeConsole(file=sys.stderr, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "") -> Iterator[ProgressTask]:
        if self.quiet:
            yield _Nothing()
            return
        if not self.console.is_terminal:
            yield _Lines(self, name, total, unit)
            return
        with Progress(*_columns(self.console.width), console=self.console, transient=True) as bars:
            yield _Bar(bars, bars.add_task(name, total=total, unit=unit, note=""))

    def line(self, text: str) -> None:
        if self.quiet:
            return
        self.console.print(escape(printable(text)))

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]![/yellow] {escape(printable(text))}")

    def metrics(self, record: dict[str, Any]) -> None:
        """Do nothing: the bar shows them."""

    def checkpoint(self, record: dict[str, Any], folder: Path) -> None:
        """Do nothing: checkpoints are in the run directory."""


def _columns(width: int) -> list[ProgressColumn]:
    """Return the columns of a bar; fewer on a narrow terminal, where rich would cut off the time left."""
    wide = width >= WIDE
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=40 if wide else 6),
        MofNCompleteColumn(),
        *([TextColumn("{task.fields[unit]}")] if wide else []),
        TextColumn("{task.fields[note]}"),
        *([TimeElapsedColumn()] if wide else []),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]


class _Nothing:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=amount, note=note)


class _Lines:
    def __init__(self, progress: TerminalProgress, name: str, total: int | None, unit: str) -> None:
        self._progress, self._name, self._total, self._unit = progress, name, total, unit
        self._done, self._last_line = 0, time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last_line < QUIET_SECONDS:
            return
        self._last_line = now
        of = f"/{self._total}" if self._total is not None else ""
        self._progress.line(f"{self._name}: {self._done}{of} {self._unit} {note}".rstrip())
