"""What a verb returns of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratune.run.directory import Record, RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A run that has ended.

    Attributes:
        run: The run directory.
        evaluation: `evaluation.json`; None without held-out data, and on every rank but 0.
    """

    run: RunDir
    evaluation: Record | None
