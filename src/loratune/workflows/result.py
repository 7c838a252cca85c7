"""What a verb returns of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.reporting.verdict import verdict_on
from loratune.run.records.base import parse_known
from loratune.run.records.evaluation import EvaluationRecord

if TYPE_CHECKING:
    from loratune.run.directory import Record, RunDir


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunResult:
    """A run that has ended.

    Attributes:
        run: The run directory.
        evaluation: `evaluation.json`; None without held-out data, and on every rank but 0.
    """

    run: RunDir
    evaluation: Record | None

    @property
    def verdict(self) -> str:
        """Whether the fine-tuned model is better than its base, in one sentence."""
        if self.evaluation is None:
            return "not measured: no data was held out (data.eval)"
        return verdict_on(parse_known(EvaluationRecord, self.evaluation)).sentence

    def __repr__(self) -> str:
        """Return the run's folder and the verdict: the evaluation holds every answer."""
        return f"RunResult({str(self.run.root)!r}: {self.verdict})"
