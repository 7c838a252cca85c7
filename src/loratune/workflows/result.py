"""What a verb returns about a run: its directory, its results, and its model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loratune.reporting.units import as_difference, as_interval, as_measure, measure_in_words
from loratune.reporting.verdict import verdict_on
from loratune.run.directory import RunDir, read_json
from loratune.run.html_table import html_table
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.records.base import parse_known
from loratune.run.records.evaluation import EvaluationRecord
from loratune.workflows.trained_model import load_model_of, load_tokenizer_of

if TYPE_CHECKING:
    from pathlib import Path

    from loratune.run.directory import Record


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
        """Whether the fine-tuned model is better than the model before the run, in one sentence."""
        if self.evaluation is None:
            return "not measured: no data was held out (data.eval)"
        return verdict_on(parse_known(EvaluationRecord, self.evaluation)).sentence

    @property
    def metrics(self) -> Any:
        """The records of `metrics.jsonl`, one for each step and evaluation: a pandas `DataFrame` if pandas is
        installed, otherwise a list of dictionaries."""
        records = self.run.read_metrics()
        if "pandas" not in sys.modules and find_spec("pandas") is None:
            return records
        import pandas as pd

        return pd.DataFrame(records)

    @property
    def samples(self) -> list[Record]:
        """The held-out prompts with the reference and the answers of both models."""
        return [] if self.evaluation is None else list(self.evaluation["items"])

    def model(self, *, progress: Progress = NO_PROGRESS) -> Any:
        """Load the base with the run's adapter, ready to answer: a PEFT model on the device of this machine.

        Raises:
            RecipeError: The run has no adapter yet, or its base is gone.
            MachineError: The base model is not on this machine and the Hub cannot be reached.
        """
        return load_model_of(self.run, progress)

    def tokenizer(self, *, progress: Progress = NO_PROGRESS) -> Any:
        """Load the tokenizer that the run was trained with, with its chat template.

        Raises:
            RecipeError: The run has no adapter yet.
        """
        return load_tokenizer_of(self.run, progress)

    def __repr__(self) -> str:
        """Return the run's folder and the verdict: the evaluation holds every answer."""
        return f"RunResult({str(self.run.root)!r}: {self.verdict})"

    def _repr_html_(self) -> str:
        """Return the verdict and a table of the measures, for notebooks."""
        rows, side = [], ""
        if self.evaluation is not None:
            record = parse_known(EvaluationRecord, self.evaluation)
            side = record.side_before
            rows = [
                (
                    measure_in_words(name),
                    as_measure(name, record.base[name]),
                    as_measure(name, record.tuned[name]),
                    as_difference(name, difference.value),
                    as_interval(name, difference),
                )
                for name, difference in record.difference.items()
            ]
        head = ("measure", side, "fine-tuned", "difference", "interval") if rows else ()
        return html_table(f"{self.run.root}: {self.verdict}", rows, head=head)


def open_result(root: str | Path) -> RunResult:
    """Return the result of a run that has ended, as `train` returned it.

    Raises:
        RecipeError: The folder is not a run, or has no adapter yet.
    """
    run = RunDir.open(root)
    run.require_adapter()
    return RunResult(run=run, evaluation=read_json(run.evaluation) if run.evaluation.is_file() else None)
