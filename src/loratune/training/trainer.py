"""transformers' trainer, told what a step is. Only this module and `stock` import trl.

`FastTrainer` and `TrlTrainer` share everything but the step itself: optimizer, schedule, callbacks, trackers from
transformers; order of the examples, checkpoints and evaluation from `RunTrainer`.

One optimizer step of `FastTrainer`, the whole of it:

    for micro_batch in step:                     # as many as the token budget makes of the step's examples
        loss = loss_sum(micro_batch) / step's supervised tokens
        loss.backward()
    gradients = their sum over all processes     # of which each has a share of the step's examples

Around it: `budget` repeats the step in smaller micro-batches when memory runs out, `watch` keeps a step that is not finite
from being applied.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerState

from loratune.model.device import is_out_of_memory
from loratune.recipe.recipe import TrainSection
from loratune.run import processes
from loratune.run.directory import RunDir, write_json
from loratune.run.errors import MachineError
from loratune.run.progress import Progress
from loratune.training.anomalies import AnomalyGuard
from loratune.training.checkpoint import (
    TRAINER_STATE,
    averaged_steps,
    best_checkpoint,
    load_adapter_weights,
    load_optimizer,
    load_random,
    save_checkpoint,
)
from loratune.training.early_stopping import Patience
from loratune.training.event_log import EventLog, History, StepMetrics
from loratune.training.gradient_sync import check_ranks_agree
from loratune.training.held_out_loss import EvaluationStoppedError, Nll, evaluate_on_all_ranks, mean_nll
from loratune.training.hf_arguments import TrainingData
from loratune.training.loss import SupervisedLoss
from loratune.training.loss_by_source import PerSourceLoss
from loratune.training.param_groups import apply_learning_rate_pattern, scale_b_learning_rate
from loratune.training.signals import StopRequest
from loratune.training.step_dataset import StepDataset, StepExamples
from loratune.training.token_budget import TokenBudget
from loratune.training.trackers import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSetup:
    """What both engines need.

    Attributes:
        model: The adapted model.
        tokenizer: Of the base model.
        train: The recipe's section.
        data: Examples and the token budget.
        loss: Of the model.
        run: Where everything is written.
        stop: Whether the user wants to stop.
        progress: Who is told.
        callback: Writes the metrics.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: TrainSection
    data: TrainingData
    loss: SupervisedLoss
    run: RunDir
    stop: StopRequest
    progress: Progress
    callback: TrainerCallback


class RunTrainer(Trainer):
    """What both engines share: the order of the examples, checkpoints, token-weighted evaluation, faults."""

    setup: TrainerSetup
    events: EventLog
    budget: TokenBudget
    watch: AnomalyGuard
    patience: Patience
    held_out: dict[int, float | None]
    steps: StepDataset
    sources: PerSourceLoss
    current_step: StepExamples
    step_metrics: StepMetrics
    row_losses: torch.Tensor | None = None
    """Of the plain path: the loss of each example of a step, summed over its supervised tokens; None where nobody asks, or knows."""
    last_evaluation: tuple[int, Nll] = (-1, [])
    """The step of the last evaluation, and what `evaluate_nll` returned there."""
    evaluate_seconds = 0.0
    """That the last evaluation took."""

    def _set_up(self, setup: TrainerSetup) -> list[TrainerCallback]:
        """Everything beside the step; returns the callbacks."""
        history = processes.gather(History.of(setup.run.read_metrics()))[0]
        self.setup, self.step_metrics = setup, StepMetrics()
        self.events = EventLog(setup.run, setup.progress)
        self.budget = TokenBudget(
            history.token_budget or setup.data.token_budget, self.events, together=setup.loss.sharded
        )
        self.watch = AnomalyGuard(setup.train, setup.loss, setup.tokenizer, self.events, history)
        self.held_out, self.patience = history.held_out, Patience(setup.train, self.events, history)
        self.sources = PerSourceLoss(setup.data.source_of_file)
        self.steps = StepDataset(setup.data.train, setup.train, setup.data.token_budget)
        trackers = setup.train.report_to if processes.is_main() else ()
        if len(self.sources) and setup.train.engine == "trl" and setup.train.label_smoothing:
            setup.progress.line("TRL smooths labels in one loss for all sources; train.engine=fast has one of each")
        return [setup.callback, Trackers(trackers, setup.run, self.events)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.setup.train.learning_rate_pattern:
            apply_learning_rate_pattern(optimizer, self.setup.model, self.setup.train.learning_rate_pattern)
        if self.setup.train.lora_plus_ratio != 1:
            scale_b_learning_rate(optimizer, self.setup.model, self.setup.train.lora_plus_ratio)
        return optimizer

    def restore(self, checkpoint: Path) -> None:
        """Be where a run is after its last step."""
        load_adapter_weights(checkpoint, self.model)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))

    def ends_early(self) -> bool:
        """Whether the held-out losses until now end the run before its last step."""
        self.events.step = self.state.global_step
        return self.state.global_step < self.state.max_steps and self.patience.is_over(self.held_out)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Token-weighted negative log-likelihood of the held-out examples; nothing where it fails or is stopped."""
        setup = self.setup
        self.events.step = self.state.global_step
        started = time.perf_counter()
        try:
            losses = evaluate_on_all_ranks(
                setup.loss, setup.data.eval, self.budget, setup.progress, setup.stop, self.events
            )
        except processes.LostPeerError:
            raise
        except EvaluationStoppedError:  # `resume` makes up for it
            self.control.should_save = self.control.should_training_stop = True
            return {}
        except Exception as error:  # a model's own code; hours of training must not end in a measurement
            if setup.loss.sharded:
                raise  # the other processes cannot go on without this one
            problem = f"{type(error).__name__}: {error}".partition("\n  fix:")[0]
            self.held_out[self.state.global_step] = None
            self.events.emit("evaluation_failed", f"the held-out loss could not be measured: {problem}")
            return {}
        self.evaluate_seconds = time.perf_counter() - started
        self.last_evaluation = self.state.global_step, losses
        metrics = {"eval_nll": mean_nll(losses)}
        self.held_out[self.state.global_step] = metrics["eval_nll"]
        metrics["eval_loss"] = metrics["eval_nll"]  # the name that transformers' callbacks and trackers look for
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.ends_early():
            self.control.should_training_stop = True
            self.control.should_save |= self.args.save_strategy != "no"  # as after the last step
        return metrics

    def nll_by_source(self) -> dict[str, float]:
        """The last evaluation's loss of each source; nothing where there is one."""
        _, losses = self.last_evaluation
        return {name: mean_nll(losses[i] for i in chosen) for name, chosen in self.setup.data.eval_groups.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        self.state.log_history.clear()  # `metrics.jsonl` has it; here it would grow with the run, and each checkpoint too

    def _stock_step(
        self, step: Callable[[], torch.Tensor], inputs: dict[str, torch.Tensor], tokens: tuple[int, int]
    ) -> torch.Tensor:
        """A step of the plain path, whose batch cannot be made smaller.

        Args:
            step: Of the stock trainer; its loss.
            inputs: Of that.
            tokens: Of the step, and supervised ones of them.
        """
        started = time.perf_counter()
        self.events.step = self.state.global_step + 1
        examples_of_step = self.steps[self.state.global_step]
        assert isinstance(examples_of_step, StepExamples)
        self.current_step = examples_of_step
        try:
            loss = step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MachineError(
                f"a batch of {inputs['input_ids'].numel():,} tokens with its padding does not fit into memory: {error}",
                fix="train.engine: fast, which cuts a step into micro-batches, or a smaller train.batch_size",
            ) from error
        by_source: dict[str, float] = {}
        if self.row_losses is not None:
            examples = examples_of_step.examples
            sums = self.sources.sums(examples, self.row_losses.double().tolist())
            by_source = self.sources.means(sums, self.sources.count(examples))
        return self._record_and_check(loss, started=started, tokens=tokens, by_source=by_source)

    def _record_and_check(
        self, total: torch.Tensor, *, started: float, tokens: tuple[int, int], by_source: dict[str, float] | None = None
    ) -> torch.Tensor:
        """The loss of the step under way, after a look at it; without gradients where it must not be applied."""
        loss, examples = float(total), self.current_step.examples
        self.step_metrics = StepMetrics(
            loss=loss,
            num_tokens=tokens[0],
            num_supervised_tokens=tokens[1],
            started=started,
            by_source=by_source or {},
        )
        if not self.watch.check("loss", loss, examples):
            self._skip()
            since = self.state.global_step - self._globalstep_last_logged
            return self._tr_loss / max(1, since)  # the mean of the steps since the last line, which it leaves as it is
        self.watch.observe(loss, examples)
        return total

    def _skip(self) -> None:
        """Each of the optimizers leaves a parameter without a gradient as it is, and its own state too."""
        self.step_metrics.skipped = True
        self.setup.model.zero_grad(set_to_none=True)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        metrics = self.step_metrics
        metrics.grad_norm, metrics.learning_rate = float(norm), self._get_learning_rate()
        if not metrics.skipped and not self.watch.check("gradient norm", metrics.grad_norm, self.current_step.examples):
            self._skip()
        return norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        setup, run, step = self.setup, self.setup.run, self.state.global_step
        check_ranks_agree(self.model)
        if processes.is_main():
            self._write_checkpoint(run.checkpoints / str(step))
        setup.progress.checkpoint({"step": step}, run.checkpoints / str(step))

    def _write_checkpoint(self, folder: Path) -> None:
        run = self.setup.run
        run.sync_metrics()  # a checkpoint that survives a power cut must find the lines before it
        save_checkpoint(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            trainer_state=json.dumps(asdict(self.state), indent=2),
            keep=self.setup.train.keep_checkpoints,
            held_out=self.held_out,
            keep_too=averaged_steps(
                self.setup.train,
                last_step=int(folder.name),
                num_steps=self.state.max_steps,
                num_per_epoch=self.steps.num_per_epoch,
            ),
        )
        best = best_checkpoint(run.checkpoints, self.held_out)
        if best is not None:
            write_json(run.best, {"step": best, "eval_nll": self.held_out[best], "checkpoint": f"checkpoints/{best}"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and processes.size() == 1:  # several draw from the step's number
            load_random(Path(checkpoint))

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate would cost time, and planning knows better
