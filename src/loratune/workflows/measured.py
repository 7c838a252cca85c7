"""Seconds, rate and memory of a run, over all its starts."""

from __future__ import annotations

import time

from loratune.model.device import peak_bytes
from loratune.run import processes
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.records.files import write_record
from loratune.run.records.plan import PlanRecord


class RunTimer:
    """Time and peak memory of one process that works on a run; an interrupted run has had several.

    The totals of earlier processes are in `plan.json` under `so_far`, until `measured` replaces them. A process that
    was killed could not write its own; its steps count all the same, since their times are in `metrics.jsonl`. Only
    rank 0 counts.
    """

    def __init__(self, run: RunDir, device: str) -> None:
        self._run, self._device = run, device
        self._started = time.perf_counter()
        self._before = read_json(run.plan).get("so_far", {}) if processes.is_main() else {}

    def note(self) -> None:
        """Record the totals so far."""
        if not processes.is_main():
            return
        record = read_json(self._run.plan)
        record["so_far"] = self._so_far()
        write_record(self._run.plan, PlanRecord, record)

    def close(self, *, evaluate_seconds: float, packing: Record) -> None:
        """Record the totals of the complete run, and mark it complete.

        Args:
            evaluate_seconds: Seconds of the evaluation after training.
            packing: Whether examples shared forward passes, from the loss.
        """
        record, metrics = read_json(self._run.plan), self._run.read_metrics()
        record.pop("so_far", None)
        record["measured"] = {**self._so_far(), **step_totals(metrics), "packing": packing}
        record["measured"]["evaluate_seconds"] = evaluate_seconds + sum(
            line["seconds"] for line in metrics if "eval_nll" in line or line.get("event") == "samples"
        )
        write_record(self._run.plan, PlanRecord, record)

    def _so_far(self) -> Record:
        return {
            "peak_bytes": max(self._before.get("peak_bytes", 0), peak_bytes(self._device)),
            "total_seconds": self._before.get("total_seconds", 0.0) + time.perf_counter() - self._started,
        }


def step_totals(metrics: list[Record]) -> Record:
    """Return seconds and rate of all optimizer steps of a run, without evaluation and saving."""
    steps = [record for record in metrics if record.get("tokens_per_second")]
    seconds = sum(record["num_tokens"] / record["tokens_per_second"] for record in steps)
    num_tokens = sum(record["num_tokens"] for record in steps)
    return {"train_seconds": seconds, "tokens_per_second": num_tokens / seconds if seconds else 0.0}
