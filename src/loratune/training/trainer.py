"""transformers' trainer, told what a step is. Only this module and `stock` import trl.

`FastTrainer` and `ReferenceTrainer` share everything but the step itself: optimizer, schedule, callbacks, trackers from
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
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from loratune import world
from loratune.data.batch import collate
from loratune.data.conversation import Rejected
from loratune.data.prepare import Stream
from loratune.data.render import Example
from loratune.errors import LoratuneError, MachineError
from loratune.model.adapter import trainable_parameters
from loratune.model.device import is_out_of_memory
from loratune.progress import Progress, Silent
from loratune.recipe import TrainSection
from loratune.run import RunDir, write_json
from loratune.training.arguments import TrainingData, own_optimizer, stock_arguments, training_arguments
from loratune.training.averaging import averaged_steps
from loratune.training.budget import TokenBudget, random_state, set_random_state
from loratune.training.by_source import Sources
from loratune.training.checkpoint import (
    TRAINER_STATE,
    best_checkpoint,
    load_adapter_weights,
    load_optimizer,
    load_random,
    save_checkpoint,
)
from loratune.training.events import Events, History, StepMetrics
from loratune.training.groups import give_own_rates, let_b_learn_faster
from loratune.training.held_out import EvaluationStoppedError, Nll, evaluate_nll, evaluate_together, mean_nll
from loratune.training.loss import SupervisedLoss
from loratune.training.order import ExampleOrder, Held, StepExamples, Steps
from loratune.training.patience import Patience
from loratune.training.shards import FILLER
from loratune.training.sharing import StepTotals, add_up_gradients, check_same, seed_step
from loratune.training.stock import labelled
from loratune.training.stopping import StopRequest
from loratune.training.trackers import Trackers
from loratune.training.watch import NumberWatch

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
    events: Events
    budget: TokenBudget
    watch: NumberWatch
    patience: Patience
    held_out: dict[int, float | None]
    steps: Steps
    sources: Sources
    under_way: StepExamples
    step_metrics: StepMetrics
    row_losses: torch.Tensor | None = None
    """Of the plain path: the loss of each example of a step, summed over its supervised tokens; None where nobody asks, or knows."""
    last_evaluation: tuple[int, Nll] = (-1, [])
    """The step of the last evaluation, and what `evaluate_nll` returned there."""
    evaluate_seconds = 0.0
    """That the last evaluation took."""

    def _set_up(self, setup: TrainerSetup) -> list[TrainerCallback]:
        """Everything beside the step; returns the callbacks."""
        history = world.gather(History.of(setup.run.read_metrics()))[0]
        self.setup, self.step_metrics = setup, StepMetrics()
        self.events = Events(setup.run, setup.progress)
        self.budget = TokenBudget(
            history.token_budget or setup.data.token_budget, self.events, together=setup.loss.sharded
        )
        self.watch = NumberWatch(setup.train, setup.loss, setup.tokenizer, self.events, history)
        self.held_out, self.patience = history.held_out, Patience(setup.train, self.events, history)
        self.sources = Sources(setup.data.source_of_file)
        self.steps = Steps(setup.data.train, setup.train, setup.data.token_budget)
        trackers = setup.train.report_to if world.is_main() else ()
        if len(self.sources) and setup.train.engine == "trl" and setup.train.label_smoothing:
            setup.progress.line("TRL smooths labels in one loss for all sources; train.engine=fast has one of each")
        return [setup.callback, Trackers(trackers, setup.run, self.events)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.setup.train.learning_rate_pattern:
            give_own_rates(optimizer, self.setup.model, self.setup.train.learning_rate_pattern)
        if self.setup.train.lora_plus_ratio != 1:
            let_b_learn_faster(optimizer, self.setup.model, self.setup.train.lora_plus_ratio)
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
            losses = evaluate_together(
                setup.loss, setup.data.eval, self.budget, setup.progress, setup.stop, self.events
            )
        except world.LostError:
            raise
        except EvaluationStoppedError:  # `resume` makes up for it
            self.control.should_save = self.control.should_training_stop = True
            return {}
        except Exception as error:  # a model's own code; hours of training must not end in a measurement
            if setup.loss.sharded:
                raise  # the other processes cannot go on without this one
            problem = f"{type(error).__name__}: {error}".partition("\n  fix:")[0]
            self.held_out[self.state.global_step] = None
            self.events.happened("evaluation_failed", f"the held-out loss could not be measured: {problem}")
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
        under_way = self.steps[self.state.global_step]
        assert isinstance(under_way, StepExamples)
        self.under_way = under_way
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
            examples = under_way.examples
            sums = self.sources.sums(examples, self.row_losses.double().tolist())
            by_source = self.sources.means(sums, self.sources.count(examples))
        return self._judged(loss, started=started, tokens=tokens, by_source=by_source)

    def _judged(
        self, total: torch.Tensor, *, started: float, tokens: tuple[int, int], by_source: dict[str, float] | None = None
    ) -> torch.Tensor:
        """The loss of the step under way, after a look at it; without gradients where it must not be applied."""
        loss, examples = float(total), self.under_way.examples
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
        self.watch.see(loss, examples)
        return total

    def _skip(self) -> None:
        """Each of the optimizers leaves a parameter without a gradient as it is, and its own state too."""
        self.step_metrics.skipped = True
        self.setup.model.zero_grad(set_to_none=True)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        metrics = self.step_metrics
        metrics.grad_norm, metrics.learning_rate = float(norm), self._get_learning_rate()
        if not metrics.skipped and not self.watch.check("gradient norm", metrics.grad_norm, self.under_way.examples):
            self._skip()
        return norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        setup, run, step = self.setup, self.setup.run, self.state.global_step
        check_same(self.model)
        if world.is_main():
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
        if checkpoint is not None and world.size() == 1:  # several draw from the step's number
            load_random(Path(checkpoint))

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate would cost time, and planning knows better


class FastTrainer(RunTrainer):
    """One `training_step` is one optimizer step: it loops over the step's micro-batches."""

    def __init__(self, setup: TrainerSetup) -> None:
        callbacks = self._set_up(setup)
        if world.size() > 1:
            logging.getLogger("transformers.training_args").addFilter(_is_no_advice_on_launching)
        # The batch size of transformers' own arithmetic is in items of the data set, and an item is a whole step.
        args = TrainingArguments(
            **training_arguments(setup.train, setup.data, setup.run),
            per_device_train_batch_size=1,
            remove_unused_columns=False,
        )
        super().__init__(
            model=setup.model,
            args=args,
            train_dataset=self.steps,
            eval_dataset=Held(setup.data.eval),
            callbacks=callbacks,
            optimizer_cls_and_kwargs=own_optimizer(setup.train),
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[StepExamples | LoratuneError]:
        return self.steps.loader(lambda: self.state.global_step)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The next step's examples.

        Raises:
            LoratuneError: A row of streamed data cannot be trained on, and may not be left out.
        """
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        for batch in batches:
            if isinstance(batch, LoratuneError):
                raise batch
        return batches, None

    def training_step(  # type: ignore[override] # a step's examples, not one batch
        self, model: Any, inputs: StepExamples, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Gradients of one optimizer step; returns its loss: the mean over the step's supervised tokens."""
        started = time.perf_counter()
        model.train()
        self.events.step = self.state.global_step + 1
        self.under_way, examples = inputs, inputs.examples
        totals = StepTotals.over_all(inputs, self.sources, self.events)
        self._tell_left_out(totals.left_out)
        seed_step(self.setup.train.seed, self.state.global_step)
        losses = self.budget.retry(
            lambda: self._gradients(examples, totals.num_supervised_tokens), undo=model.zero_grad
        )
        losses = add_up_gradients(self.model, losses, self.setup.stop)
        return self._judged(
            losses[0],
            started=started,
            tokens=(totals.num_tokens, totals.num_supervised_tokens),
            by_source=self.sources.means(losses[1:].tolist(), totals.by_source),
        )

    def _tell_left_out(self, rows: Sequence[Rejected]) -> None:
        if rows:
            places = "; ".join(f"{row.origin}: {row.reason}" for row in rows)
            listed = [{"file": row.origin.file, "line": row.origin.line, "reason": row.reason} for row in rows]
            self.events.happened("left_out", f"left out of step {self.events.step}: {places}", rows=listed)

    def _gradients(self, examples: Sequence[Example], num_supervised_tokens: int) -> torch.Tensor:
        """Accumulates them; returns the loss of these examples, and the sum of the losses of each source's tokens."""
        losses = torch.zeros(1 + len(self.sources), device=self.args.device)
        for chosen in self.budget.micro_batches(examples, range(len(examples))):
            batch = collate([examples[i] for i in chosen] or [FILLER]).to(self.args.device)
            tally = self.sources.tally([examples[i] for i in chosen], self.args.device)
            each = None if tally is None else tally.each_S
            loss = self.setup.loss.sum(batch, each) * bool(chosen) / num_supervised_tokens
            self.accelerator.backward(loss)
            losses[0] += loss.detach()
            if tally is not None:
                losses[1:] += tally.sums()
        return losses

    def rehearse(self) -> None:
        """Run the largest micro-batches of training and evaluation once, so that memory runs out now or not at all.

        Gradients and random numbers are afterwards as they were, so the run is the same to the bit.
        """
        setup, before = self.setup, random_state()
        self.events.step = self.state.global_step
        known = setup.data.known
        largest = [known[i] for i in self.budget.largest_micro_batch(known, setup.train.batch_size)]
        setup.model.train()
        self.budget.retry(lambda: self._gradients(largest, 1), undo=setup.model.zero_grad)
        setup.model.zero_grad()
        if setup.data.eval:
            chosen = self.budget.largest_micro_batch(setup.data.eval, len(setup.data.eval))
            evaluate_nll(setup.loss, [setup.data.eval[i] for i in chosen], self.budget, Silent())
        set_random_state(before)


class ReferenceTrainer(RunTrainer, SFTTrainer):
    """The stock `SFTTrainer` on the same examples in the same order: the plain path that the fast one must equal."""

    def __init__(self, setup: TrainerSetup) -> None:
        callbacks, data = self._set_up(setup), setup.data
        assert not isinstance(data.train, Stream), "the recipe refuses it"
        self._order = ExampleOrder(len(data.train), setup.train, lambda: self.state.global_step)
        adapter = {name: parameter.data for name, parameter in trainable_parameters(setup.model).items()}
        bf16 = setup.model.get_base_model().dtype == torch.bfloat16
        SFTTrainer.__init__(
            self,
            model=setup.model,
            args=SFTConfig(**stock_arguments(setup.train, data, setup.run, bf16=bf16)),
            train_dataset=labelled(data.train),
            eval_dataset=labelled(data.eval) if data.eval else None,
            processing_class=setup.tokenizer,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=own_optimizer(setup.train),
        )
        for name, parameter in trainable_parameters(setup.model).items():
            parameter.data = adapter[name]  # TRL rounds adapters on a quantised base to bfloat16
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if not len(self.sources) or self.setup.train.label_smoothing:
            return super().compute_loss(model, inputs, *args, **kwargs)

        def look(_: Any, __: Any, outputs: Any) -> None:
            self.row_losses = -outputs.log_probs.detach().sum(1)  # zero where nothing is supervised

        hook = model.register_forward_hook(look)  # with `return_outputs` TRL would go forward once more
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            hook.remove()

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        tokens = int(inputs["attention_mask"].sum()), int((inputs["labels"][:, 1:] != -100).sum())
        return self._stock_step(
            lambda: SFTTrainer.training_step(self, model, inputs, num_items_in_batch), inputs, tokens
        )


def _is_no_advice_on_launching(record: logging.LogRecord) -> bool:
    """That the process group is there while the trainer sees one process, which is how it is meant: see `world`."""
    return "parallel_mode" not in record.getMessage()


def resume_state(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
