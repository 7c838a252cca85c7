"""The callback around each step: metrics file, progress bar, and when to evaluate, save and stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from loratune.model.device import peak_bytes

if TYPE_CHECKING:
    from loratune.run.directory import RunDir
    from loratune.run.progress import Progress, ProgressTask
    from loratune.training.event_log import StepMetrics
    from loratune.training.signals import StopRequest


class RunCallback(TrainerCallback):
    """Writes `metrics.jsonl`, advances the progress bar, prints loss lines, and stops the run on request.

    Whatever the recipe schedules for the end of an epoch happens at the end of its last step: log, evaluate, save, in
    this order. So everything about a step is on disk before its checkpoint, and a run resumed from there lacks nothing.

    Args:
        run: The run directory, which gets the metrics.
        progress: Receives lines and metrics.
        task: The progress bar, in optimizer steps.
        stop: The user's request to stop.
        num_per_epoch: Optimizer steps of an epoch.

    Attributes:
        stopped_at: The step after which the run was stopped, which has a checkpoint; None: it was not stopped.
        branch: A step that gets a checkpoint whatever the cadence (`branch_step`); None for none.
    """

    branch: int | None = None

    def __init__(
        self, run: RunDir, progress: Progress, task: ProgressTask, stop: StopRequest, num_per_epoch: int
    ) -> None:
        self._run, self._progress, self._task = run, progress, task
        self._stop, self._num_per_epoch = stop, num_per_epoch
        self._trainer: Any = None
        self._num_tokens = 0
        self._seconds = 0.0
        self.stopped_at: int | None = None

    def watch(self, trainer: Any) -> None:
        """Take the metrics of each step from this trainer."""
        self._trainer = trainer

    def evaluate_if_owed(self) -> None:
        """Run the evaluation that is due after the last finished step, if the run was stopped before it.

        Raises:
            Interrupted: The user stops the run again.
        """
        args, state = self._trainer.args, self._trainer.state
        if state.global_step and state.global_step not in self._trainer.held_out and self._evaluates(args, state):
            self._trainer.evaluate()
            if self._stop:  # before another step, after which nothing would show that this evaluation is missing
                raise self._stop.after(state.global_step, state.max_steps, self._run)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evaluate_if_owed()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(args, state)
        self._trainer.drop_checkpoint()
        if self._ends_epoch(state):
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_save |= args.save_strategy == "epoch"
        control.should_evaluate = self._evaluates(args, state)
        if state.global_step == self._trainer.pause:
            control.should_save = control.should_training_stop = True
        control.should_save |= state.global_step == self.branch
        if self._stop:
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_evaluate = False  # the user does not want to wait; `resume` runs it first
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # All of it happened in `on_step_end`, of the epoch's last step.
        control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stop:  # the request may have come during the evaluation, after `on_step_end`
            self.stopped_at = state.global_step
            control.should_training_stop = True

    def _ends_epoch(self, state: TrainerState) -> bool:
        return state.global_step % self._num_per_epoch == 0 or state.global_step >= state.max_steps

    def _evaluates(self, args: TrainingArguments, state: TrainerState) -> bool:
        if args.eval_strategy == IntervalStrategy.NO:
            return False
        if args.eval_strategy == IntervalStrategy.EPOCH:
            return self._ends_epoch(state)
        return state.global_step % state.eval_steps == 0 or state.global_step >= state.max_steps

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        step: StepMetrics = self._trainer.step_metrics
        if step.skipped:  # its event is the line of this step
            self._task.advance(1, "skipped")
            return
        seconds = time.perf_counter() - step.started
        self._num_tokens += step.num_tokens
        self._seconds += seconds
        record = {
            "step": state.global_step,
            "time": time.time(),
            "epoch": state.epoch,
            "loss": step.loss,
            **({"loss_by_source": step.by_source} if step.by_source else {}),
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "num_tokens": step.num_tokens,
            "num_supervised_tokens": step.num_supervised_tokens,
            **({} if step.num_processed_tokens is None else {"num_processed_tokens": step.num_processed_tokens}),
            "tokens_per_second": step.num_tokens / seconds,
            "peak_bytes": (peak := peak_bytes(args.device.type)),
        }
        self._run.append_metrics(record)
        self._progress.metrics(record)
        rate = self._num_tokens / self._seconds
        self._task.advance(1, f"loss {step.loss:.4f} · {rate:,.0f} tokens/s · {peak / 2**30:.1f} GiB")

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
            rate = self._num_tokens / max(self._seconds, 1e-9)
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
        seconds = self._trainer.evaluate_seconds
        record = {"step": state.global_step, "epoch": state.epoch, "eval_nll": nll, "seconds": seconds}
        by_source: dict[str, float] = self._trainer.nll_by_source()
        parts = ", ".join(f"{name} {value:.4f}" for name, value in by_source.items())
        self._run.append_metrics({**record, "eval_nll_by_source": by_source} if by_source else record)
        self._progress.line(
            f"step {state.global_step}/{state.max_steps} · held-out loss {nll:.4f}" + (f" ({parts})" if parts else "")
        )
