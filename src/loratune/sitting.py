"""What a run took, over all processes that worked on it: seconds, rate, memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from loratune.run import Record, RunDir, read_json, write_json


class Sitting:
    """The time from one start of the process to its end, and its memory; a run has several when it was stopped.

    What earlier ones came to stands in `plan.json` under `so_far`, until `measured` replaces it. A sitting that was killed
    could not write its own; its steps count all the same, their times are in `metrics.jsonl`.
    """

    def __init__(self, run: RunDir, device: str) -> None:
        self._run, self._device = run, device
        self._started = time.perf_counter()
        self._before = read_json(run.plan).get("so_far", {})

    def note(self) -> None:
        """Write down what there is until now."""
        record = read_json(self._run.plan)
        record["so_far"] = self._so_far()
        write_json(self._run.plan, record)

    def close(self) -> None:
        """Write down what the whole run came to."""
        record = read_json(self._run.plan)
        record.pop("so_far", None)
        record["measured"] = {**self._so_far(), **step_totals(self._run.read_metrics())}
        write_json(self._run.plan, record)

    def _so_far(self) -> Record:
        return {
            "peak_bytes": max(self._before.get("peak_bytes", 0), peak_bytes(self._device)),
            "total_seconds": self._before.get("total_seconds", 0.0) + time.perf_counter() - self._started,
        }


def step_totals(metrics: list[Record]) -> Record:
    """Seconds and rate of all optimizer steps of a run, also those before it was resumed, without evaluation and saving."""
    steps = [record for record in metrics if record.get("tokens_per_second")]
    seconds = sum(record["num_tokens"] / record["tokens_per_second"] for record in steps)
    num_tokens = sum(record["num_tokens"] for record in steps)
    return {"train_seconds": seconds, "tokens_per_second": num_tokens / seconds if seconds else 0.0}


def peak_bytes(device: str) -> int:
    """The most memory that this process has had on the device."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
