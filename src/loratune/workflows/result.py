"""workflows.result."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.run.directory import Record, RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run left behind.

    Attributes:
        run: Its directory.
        evaluation: `evaluation.json`, or None without held-out data; None in all processes but the first.
    """

    run: RunDir
    evaluation: Record | None
