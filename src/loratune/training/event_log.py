"""What happens to a run beside its steps: told to the user, and a line in `metrics.jsonl` for the report and for `resume`.

{"step": 7, "time": …, "event": "skipped", "message": "the loss of step 7 is nan: …", "examples": […]}

event               further fields
out_of_memory       token_budget: the one that holds from here on
skipped             examples: those of the step
left_out            rows: of streamed data, that turned out to be no examples
spike               loss, median; examples
evaluation_failed
tracker_failed
early_stopping      lowest_at: the step with the lowest held-out loss
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loratune.run import processes
from loratune.run.directory import Record, RunDir
from loratune.run.progress import Progress


@dataclass(slots=True)
class StepMetrics:
    """What is known about the step under way; `metrics.jsonl` gets it when the step is done."""

    loss: float = math.nan
    grad_norm: float = math.nan
    learning_rate: float = math.nan
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    started: float = 0.0
    skipped: bool = False
    by_source: dict[str, float] = field(default_factory=dict)
    """Source → its loss, where there are several."""


class EventLog:
    """Tells and writes down.

    Args:
        run: Whose `metrics.jsonl`.
        progress: Who is told.

    Attributes:
        step: The optimizer step under way, counted from 1; the trainer keeps it.
    """

    step = 0

    def __init__(self, run: RunDir, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._untold: list[Record] = []

    def emit(self, event: str, message: str, *, told: bool = True, **fields: Any) -> None:
        """Write an event down; `told`: and warn the user."""
        if told:
            self._progress.warn(message)
        self._run.append_metrics({"step": self.step, "time": time.time(), "event": event, "message": message, **fields})

    def emit_local(self, event: str, message: str, **fields: Any) -> None:
        """The same of an event that other processes do not see: the first process tells it when it hears of it."""
        if processes.is_main():
            self.emit(event, message, **fields)
        else:
            self._untold.append({"event": event, "message": f"process {processes.rank()}: {message}", **fields})

    def drain(self) -> list[Record]:
        """What this process has to tell, and has not yet handed over."""
        untold, self._untold = self._untold, []
        return untold

    def replay(self, untold: Iterable[Record]) -> None:
        """Tell what happened in other processes."""
        for record in untold:
            self.emit(**record)


@dataclass(frozen=True, slots=True)
class History:
    """What a run that goes on knows of its earlier steps, from `metrics.jsonl`.

    Attributes:
        losses: Of all steps, in their order.
        held_out: Step → held-out loss, None where the evaluation failed.
        num_skipped: Steps that were not applied.
        token_budget: The one that the last out-of-memory error left; None where there was none.
        stopped_early: Whether it was told that training ends before the last step.
    """

    losses: list[float]
    held_out: dict[int, float | None]
    num_skipped: int
    token_budget: int | None
    stopped_early: bool = False

    @classmethod
    def of(cls, metrics: Iterable[Record]) -> History:
        """Read it from the lines."""
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
