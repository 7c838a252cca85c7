"""What both engines share around the step: transformers' `Trainer` with our order of examples, checkpoints and
evaluation.

    transformers.Trainer     the loop: optimizer, learning-rate schedule, gradient clipping, callbacks
      └ RunTrainer           order of examples, events, anomalies, held-out loss, checkpoints      (this file)
          ├ FastTrainer      the step as micro-batches without padding                             (fast_trainer)
          ├ TrlTrainer       the step of stock SFTTrainer, the reference for texts                 (trl_trainer)
          └ TrlClassifierTrainer   the step of stock Trainer, the reference for classes            (classifier_trainer)

A subclass implements `training_step` and ends it with `_record_and_check`. Only trl_trainer and trl_dataset import trl.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerState

from loratune.data.steps import trigger_steps
from loratune.model.device import is_out_of_memory
from loratune.run import processes
from loratune.run.directory import RunDir, write_json
from loratune.run.errors import OutOfMemory
from loratune.training.anomalies import AnomalyGuard
from loratune.training.checkpoint import (
    TRAINER_STATE,
    averaged_steps,
    best_checkpoint,
    load_adapter_weights,
    load_optimizer,
    load_random,
    remove_checkpoint,
    save_checkpoint,
)
from loratune.training.early_stopping import Patience
from loratune.training.event_log import EventLog, History, StepMetrics
from loratune.training.gradient_sync import check_ranks_agree
from loratune.training.held_out_loss import EvaluationStoppedError, Nll, evaluate_on_all_ranks, mean_nll
from loratune.training.hf_arguments import own_optimizer
from loratune.training.loss_by_source import PerSourceLoss
from loratune.training.param_groups import apply_learning_rate_pattern, scale_b_learning_rate
from loratune.training.step_dataset import StepDataset, StepExamples
from loratune.training.token_budget import TokenBudget
from loratune.training.trackers import Trackers
from loratune.training.unreached import unreached_in_words, without_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from loratune.recipe.recipe import TrainSection
    from loratune.run.progress import Progress
    from loratune.training.hf_arguments import TrainingData
    from loratune.training.loss import SupervisedLoss
    from loratune.training.signals import StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSetup:
    """Arguments of both engines.

    Attributes:
        model: The base model with its adapter.
        tokenizer: The base model's tokenizer.
        train: The recipe's `train` section.
        data: Training and held-out examples, and the token budget.
        loss: The loss that `model` is trained and evaluated with.
        run: The run directory, where metrics and checkpoints go.
        stop: The user's request to stop, if any.
        progress: Receives progress lines and warnings.
        callback: Writes `metrics.jsonl` (`callbacks.RunCallback`).
        more_callbacks: The user's own, which are called after ours.
        branch: A step whose checkpoint is always kept (`hf_arguments.branch_step`); None for none.
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
    more_callbacks: Sequence[TrainerCallback] = ()
    branch: int | None = None


class RunTrainer(Trainer):
    """A transformers `Trainer` with reproducible order, our checkpoints, token-weighted evaluation and fault handling.

    Attributes:
        row_losses: Set by the plain engines: the loss of each example of the step, summed over its supervised tokens;
            None where the data has one source.
        reach_is_known: Whether the modules without a gradient have been reported, which the run's first step does.
        last_evaluation: The step of the last evaluation, and what `evaluate_nll` returned there.
        pause: The step after which to pause the run, with a checkpoint; None: it is not paused.
        dropped: The step of an earlier pause, whose checkpoint is deleted after the next step unless the recipe saves
            one there; None: there is none.
        evaluate_seconds: Seconds that the last evaluation took.
        held_out: Step → held-out loss; None where the evaluation failed.
    """

    setup: TrainerSetup
    events: EventLog
    budget: TokenBudget
    anomaly_guard: AnomalyGuard
    patience: Patience
    held_out: dict[int, float | None]
    steps: StepDataset
    sources: PerSourceLoss
    current_step: StepExamples
    step_metrics: StepMetrics
    row_losses: torch.Tensor | None = None
    reach_is_known = False
    last_evaluation: tuple[int, Nll] = (-1, [])
    pause: int | None = None
    dropped: int | None = None
    evaluate_seconds = 0.0

    def _set_up(self, setup: TrainerSetup) -> list[TrainerCallback]:
        """Create everything but the step itself; return the callbacks."""
        # Rank 0's file decides: every rank must know the same history, or they would stop at different steps.
        history = processes.gather(History.of(setup.run.read_metrics()))[0]
        self.setup, self.step_metrics = setup, StepMetrics()
        self.events = EventLog(setup.run, setup.progress)
        self.budget = TokenBudget(
            history.token_budget or setup.data.token_budget, self.events, together=setup.loss.sharded
        )
        self.anomaly_guard = AnomalyGuard(setup.train, setup.loss, setup.tokenizer, self.events, history)
        self.reach_is_known = bool(history.losses)
        self.held_out, self.patience = history.held_out, Patience(setup.train, self.events, history)
        self.sources = PerSourceLoss(setup.data.source_of_file)
        self.steps = StepDataset(setup.data.train, setup.train, setup.data.token_budget)
        trackers = setup.train.report_to if processes.is_main() else ()
        if len(self.sources) and setup.train.engine == "trl" and setup.train.label_smoothing:
            setup.progress.line(
                "no loss by source: TRL reports one smoothed loss for all sources; train.engine=fast reports each"
            )
        return [setup.callback, Trackers(trackers, setup.run, self.events), *setup.more_callbacks]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        # Not an argument: only some of the stock trainers take it.
        self.optimizer_cls_and_kwargs = own_optimizer(self.setup.train)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.setup.train.learning_rate_pattern:
            apply_learning_rate_pattern(optimizer, self.setup.model, self.setup.train.learning_rate_pattern)
        if self.setup.train.lora_plus_ratio != 1:
            scale_b_learning_rate(optimizer, self.setup.model, self.setup.train.lora_plus_ratio)
        return optimizer

    def restore(self, checkpoint: Path) -> None:
        """Load adapter and trainer state of the last step's checkpoint, as if the last step had just been taken."""
        load_adapter_weights(checkpoint, self.model)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))

    def ends_early(self) -> bool:
        """Tell whether early stopping ends the run at the current step, before its last one."""
        self.events.step = self.state.global_step
        return self.state.global_step < self.state.max_steps and self.patience.is_over(self.held_out)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the token-weighted held-out loss; an empty dict if the evaluation failed or was interrupted."""
        setup = self.setup
        self.events.step = self.state.global_step
        started = time.perf_counter()
        try:
            losses = evaluate_on_all_ranks(
                setup.loss, setup.data.eval, self.budget, setup.progress, setup.stop, self.events
            )
        except processes.LostPeerError:
            raise
        except EvaluationStoppedError:  # `resume` runs this evaluation first
            self.control.should_save = self.control.should_training_stop = True
            return {}
        except Exception as error:  # from the model's own code; a measurement must not cost hours of training
            if setup.loss.sharded:
                raise  # the other ranks wait for this one in the middle of a layer
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
            self.control.should_save |= self.args.save_strategy != "no"  # as transformers does after the last step
        return metrics

    def nll_by_source(self) -> dict[str, float]:
        """Return the last held-out loss of each source; an empty dict for data of one source."""
        _, losses = self.last_evaluation
        return {name: mean_nll(losses[i] for i in chosen) for name, chosen in self.setup.data.eval_groups.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        # `metrics.jsonl` has it. Kept here too, it would be written into every checkpoint and grow with the run.
        self.state.log_history.clear()

    def _stock_step(
        self, step: Callable[[], torch.Tensor], inputs: dict[str, torch.Tensor], tokens: tuple[int, int]
    ) -> torch.Tensor:
        """Take a step of a plain engine, whose batch cannot be split when memory runs out.

        Args:
            step: Calls the stock trainer's `training_step` and returns its loss.
            inputs: The batch of that call.
            tokens: Tokens of the step without padding, and how many of them are supervised.

        Raises:
            OutOfMemory: The batch does not fit into memory.
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
            raise OutOfMemory(
                f"a batch of {inputs['input_ids'].numel():,} tokens including padding does not fit into memory: "
                f"{error}",
                fix="train.engine: fast, which splits a step into micro-batches, or a smaller train.batch_size",
            ) from error
        by_source: dict[str, float] = {}
        if self.row_losses is not None:
            examples = examples_of_step.examples
            sums = self.sources.sums(examples, self.row_losses.double().tolist())
            by_source = self.sources.means(sums, self.sources.count(examples))
        return self._record_and_check(loss, started=started, tokens=tokens, by_source=by_source)

    def _record_and_check(
        self,
        total: torch.Tensor,
        *,
        started: float,
        tokens: tuple[int, int],
        by_source: dict[str, float] | None = None,
        num_processed_tokens: int | None = None,
    ) -> torch.Tensor:
        """Record the current step's loss and return it; drop its gradients if the loss is not finite.

        Args:
            total: The step's loss, a scalar: the mean over its supervised tokens.
            started: `time.perf_counter()` at the start of the step.
            tokens: Tokens of the step, and how many of them are supervised.
            by_source: Source → mean loss of its supervised tokens.
            num_processed_tokens: Tokens that went through the model, where shared prefixes do once; else None.
        """
        loss, examples = float(total), self.current_step.examples
        self.step_metrics = StepMetrics(
            loss=loss,
            num_tokens=tokens[0],
            num_supervised_tokens=tokens[1],
            num_processed_tokens=num_processed_tokens,
            started=started,
            by_source=by_source or {},
        )
        if not self.anomaly_guard.check("loss", loss, examples):
            self._skip()
            # transformers adds what is returned here to its running sum; the mean so far leaves the mean unchanged
            since = self.state.global_step - self._globalstep_last_logged
            return self._tr_loss / max(1, since)
        self.anomaly_guard.observe(loss, examples)
        return total

    def _skip(self) -> None:
        """Keep the current step from being applied."""
        self.step_metrics.skipped = True
        # Not zeros: every optimizer here ignores a parameter whose gradient is None, and its state with it.
        self.setup.model.zero_grad(set_to_none=True)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        metrics = self.step_metrics
        metrics.grad_norm, metrics.learning_rate = float(norm), self._get_learning_rate()
        if not metrics.skipped:
            examples = self.current_step.examples
            if not self.anomaly_guard.check("gradient norm", metrics.grad_norm, examples):
                self._skip()
            elif not self.reach_is_known:
                self._report_unreached()
        return norm

    def _report_unreached(self) -> None:
        """Warn of trained modules that the run's first step left without a gradient."""
        self.reach_is_known = True
        names = without_gradient(self.setup.model)
        if names:
            self.events.emit("unreached", unreached_in_words(names), modules=names)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        setup, run, step = self.setup, self.setup.run, self.state.global_step
        check_ranks_agree(self.model)
        if processes.is_main():
            self._write_checkpoint(run.checkpoints / str(step))
        setup.progress.checkpoint({"step": step}, run.checkpoints / str(step))

    def _is_of_recipe(self, step: int) -> bool:
        """Tell whether the recipe saves a checkpoint at a step, so that a run without pauses has it too."""
        train, state = self.setup.train, self.state
        cadence = trigger_steps(train.save_every, steps=state.max_steps, num_per_epoch=self.steps.num_per_epoch)
        ends_here = step == state.global_step and train.save_every != "never" and self.ends_early()
        return step in cadence or step == self.setup.branch or ends_here

    def _write_checkpoint(self, folder: Path) -> None:
        run, step = self.setup.run, int(folder.name)
        run.sync_metrics()  # a checkpoint that survives a power cut needs the metrics of the steps before it
        save_checkpoint(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            trainer_state=json.dumps(asdict(self.state), indent=2),
            # One that a pause adds must not push out another, which the run would still have without the pause.
            keep=None if step == self.pause and not self._is_of_recipe(step) else self.setup.train.keep_checkpoints,
            held_out=self.held_out,
            keep_too={
                self.setup.branch,
                *averaged_steps(
                    self.setup.train,
                    last_step=step,
                    num_steps=self.state.max_steps,
                    num_per_epoch=self.steps.num_per_epoch,
                ),
            },
        )
        self._write_best()

    def drop_checkpoint(self) -> None:
        """Delete the checkpoint at which a sweep had paused the run, if the recipe saves none there."""
        step, self.dropped = self.dropped, None
        if step is None or self._is_of_recipe(step) or not processes.is_main():
            return
        remove_checkpoint(self.setup.run.checkpoints / str(step))
        self.setup.run.best.unlink(missing_ok=True)
        self._write_best()

    def _write_best(self) -> None:
        """Name the checkpoint with the lowest held-out loss, if there is one."""
        run, best = self.setup.run, best_checkpoint(self.setup.run.checkpoints, self.held_out)
        if best is not None:
            write_json(run.best, {"step": best, "eval_nll": self.held_out[best], "checkpoint": f"checkpoints/{best}"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(Path(checkpoint))

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate would cost time; `planning` has a better one
