"""How long-running work reports its progress, independent of who shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol


class ProgressTask(Protocol):
    """A piece of work in progress."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report `amount` more units as done; `note` is shown next to the bar."""


class Progress(Protocol):
    """A listener: the terminal, a log, or none."""

    def task(self, name: str, total: int | None, unit: str = "") -> AbstractContextManager[ProgressTask]:
        """Start a piece of work of `total` units; a context manager that yields the `Task`."""

    def line(self, text: str) -> None:
        """Show a line."""

    def warn(self, text: str) -> None:
        """Show a line that the user should not miss."""

    def metrics(self, record: dict[str, Any]) -> None:
        """Report a line of `metrics.jsonl`; called by every process of a run."""

    def checkpoint(self, record: dict[str, Any], folder: Path) -> None:
        """Report a checkpoint that was written; called by every process of a run."""


class NoProgress:
    """A listener that shows nothing."""

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "") -> Iterator[ProgressTask]:  # noqa: ARG002
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def metrics(self, record: dict[str, Any]) -> None:
        pass

    def checkpoint(self, record: dict[str, Any], folder: Path) -> None:
        pass


NO_PROGRESS = NoProgress()
"""The default of every `progress` argument: nothing is shown."""
