"""What happens beside a step: the metrics file, the progress bar, stopping in good order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loratune.model.device import peak_bytes
from loratune.progress import Progress, Task
from loratune.run import RunDir
from loratune.training.trainer import StepMetrics


class RunCallback(TrainerCallback):
    """Writes `metrics.jsonl`, moves the bar, prints a line when the recipe wants one, stops when asked.

    Args:
        run: Where the metrics go.
        progress: Who is told of lines and warnings.
        task: The bar, of optimizer steps.
    """

    def __init__(self, run: RunDir, progress: Progress, task: Task) -> None:
        self._run, self._progress, self._task = run, progress, task
        self._trainer: Any = None
        self._num_tokens = 0
        self._seconds = 0.0
        self.stop_requested = False
        self.stopped_at: int | None = None

    @property
    def train_seconds(self) -> float:
        """Seconds spent in steps, without evaluation and saving."""
        return self._seconds

    def watch(self, trainer: Any) -> None:
        """Read the step's metrics from this trainer."""
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step: StepMetrics = self._trainer.step_metrics
        seconds = time.perf_counter() - step.started
        self._num_tokens += step.num_tokens
        self._seconds += seconds
        self._run.append_metrics(
            {
                "step": state.global_step,
                "time": time.time(),
                "epoch": state.epoch,
                "loss": step.loss,
                "learning_rate": step.learning_rate,
                "grad_norm": step.grad_norm,
                "num_tokens": step.num_tokens,
                "num_supervised_tokens": step.num_supervised_tokens,
                "tokens_per_second": step.num_tokens / seconds,
                "peak_bytes": (peak := peak_bytes(args.device.type)),
            }
        )
        rate = self._num_tokens / self._seconds
        self._task.advance(1, f"loss {step.loss:.4f} · {rate:,.0f} tokens/s · {peak / 2**30:.1f} GiB")
        if self.stop_requested and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped_at is not None:  # it is saved already, and who stops does not want to wait for an evaluation
            control.should_save = control.should_evaluate = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        where = f"step {state.global_step}/{state.max_steps} · epoch {state.epoch or 0:.2f}"
        if "loss" in logs:
            rate = self._num_tokens / self._seconds
            self._progress.line(
                f"{where} · loss {logs['loss']:.4f} · learning rate {logs['learning_rate']:.2e} · {rate:,.0f} tokens/s"
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        nll = (metrics or {})["eval_nll"]
        self._run.append_metrics({"step": state.global_step, "epoch": state.epoch, "eval_nll": nll})
        self._progress.line(f"step {state.global_step}/{state.max_steps} · held-out loss {nll:.4f}")


@contextmanager
def stopping_in_order(callback: RunCallback, progress: Progress) -> Iterator[None]:
    """While the context lasts, Ctrl-C and SIGTERM finish the step and save; a second one stops at once.

    Signals reach the main thread only; elsewhere (a notebook's worker, a server) they are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if callback.stop_requested:
            raise KeyboardInterrupt
        callback.stop_requested = True
        progress.warn("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
