"""How long work tells that it goes on, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Tell that `amount` more is done; `note` is shown beside the bar."""


class Progress(Protocol):
    """A listener: the terminal, a log, or nobody."""

    def task(self, name: str, total: int | None, unit: str = "") -> AbstractContextManager[Task]:
        """Start a piece of work of `total` units; a context manager that yields the `Task`."""

    def line(self, text: str) -> None:
        """Say one line."""

    def warn(self, text: str) -> None:
        """Say one line that the user should not miss."""

    def metrics(self, record: dict[str, Any]) -> None:
        """Tell a step's line of `metrics.jsonl`, by every process of a run."""

    def checkpoint(self, record: dict[str, Any], folder: Path) -> None:
        """Tell of a checkpoint that was written, by every process of a run."""


class NoProgress:
    """Nobody listens."""

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "") -> Iterator[Task]:  # noqa: ARG002
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
