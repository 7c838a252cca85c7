"""Events of a run besides its steps: a warning to the user, and a line in `metrics.jsonl` for the report and `resume`.

{"step": 7, "time": …, "event": "skipped", "message": "the loss of step 7 is nan: …", "examples": […]}

event               further fields
out_of_memory       token_budget: the new one
skipped             examples: the worst of the step
left_out            rows: rows of streamed data that cannot be trained on
spike               value: the loss; median; examples: the worst of the step
evaluation_failed
tracker_failed
unreached           modules: trained modules and experts without a gradient in the first step
early_stopping      lowest_at: the step with the lowest held-out loss
samples             answers: of the adapter as it was after the step; seconds
samples_failed
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratune.run import processes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loratune.run.directory import Record, RunDir
    from loratune.run.progress import Progress


@dataclass(slots=True)
class StepMetrics:
    """Metrics of the current step, written to `metrics.jsonl` when the step is done.

    Attributes:
        started: `time.perf_counter()` at the start of the step.
        skipped: Whether the step is not applied.
        by_source: Source → its loss, if there are several sources.
        num_processed_tokens: Tokens that went through the model, where shared prefixes do once; else None.
    """

    loss: float = math.nan
    grad_norm: float = math.nan
    learning_rate: float = math.nan
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_processed_tokens: int | None = None
    started: float = 0.0
    skipped: bool = False
    by_source: dict[str, float] = field(default_factory=dict)


class EventLog:
    """Warns the user of events and records them.

    Args:
        run: The run directory, whose `metrics.jsonl` gets the records.
        progress: Receives the warnings.

    Attributes:
        step: The current optimizer step, counted from 1; set by the trainer.
    """

    step = 0

    def __init__(self, run: RunDir, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._pending: list[Record] = []

    def emit(self, event: str, message: str, *, warn: bool = True, **fields: Any) -> None:
        """Record an event, and warn the user of it unless `warn` is false."""
        if warn:
            self._progress.warn(message)
        self._run.append_metrics({"step": self.step, "time": time.time(), "event": event, "message": message, **fields})

    def emit_local(self, event: str, message: str, **fields: Any) -> None:
        """Emit an event that happened on this rank only; other ranks than the first keep it until `drain`."""
        if processes.is_main():
            self.emit(event, message, **fields)
        else:
            self._pending.append({"event": event, "message": f"process {processes.rank()}: {message}", **fields})

    def drain(self) -> list[Record]:
        """Return and clear the events of this rank that are yet to be sent to the others."""
        pending, self._pending = self._pending, []
        return pending

    def replay(self, pending: Iterable[Record]) -> None:
        """Emit the events of other ranks, which their `drain` returned."""
        for record in pending:
            self.emit(**record)


@dataclass(frozen=True, slots=True)
class History:
    """What a resumed run knows about its earlier steps, from `metrics.jsonl`.

    Attributes:
        losses: The losses of all applied steps, in order.
        held_out: Step → held-out loss, None where the evaluation failed.
        num_skipped: Number of steps that were not applied.
        token_budget: The budget after the last out-of-memory error; None: there was no such error.
        stopped_early: Whether early stopping has been recorded.
    """

    losses: list[float]
    held_out: dict[int, float | None]
    num_skipped: int
    token_budget: int | None
    stopped_early: bool = False

    @classmethod
    def of(cls, metrics: Iterable[Record]) -> History:
        """Read the history from the lines of `metrics.jsonl`."""
        losses: list[float] = []
        held_out: dict[int, float | None] = {}
        num_skipped, token_budget, stopped_early = 0, None, False
        for line in metrics:
            if "eval_nll" in line:
                held_out[line["step"]] = line["eval_nll"]
            elif "loss" in line:
                losses.append(line["loss"])
            match line.get("event"):
                case "evaluation_failed":
                    held_out[line["step"]] = None
                case "skipped":
                    num_skipped += 1
                case "out_of_memory":
                    token_budget = line["token_budget"]
                case "early_stopping":
                    stopped_early = True
        return cls(losses, held_out, num_skipped, token_budget, stopped_early)
