"""transformers' trainer, told what a step is. Only this module and `stock` import trl.

`FastTrainer` and `ReferenceTrainer` share everything but the step itself: optimizer, schedule, callbacks, trackers from
transformers; order of the examples, checkpoints and evaluation from `_RunTrainer`.

One optimizer step of `FastTrainer`, the whole of it:

    for micro_batch in step:                     # as many as the token budget makes of the step's examples
        loss = loss_sum(micro_batch) / step's supervised tokens
        loss.backward()
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from trl import SFTConfig, SFTTrainer

from loratune.data.batch import MicroBatch, collate, num_supervised
from loratune.data.render import Example
from loratune.data.steps import EpochPlan, epoch_order, num_steps, num_steps_per_epoch, pack
from loratune.errors import RunError
from loratune.progress import Progress
from loratune.recipe import TrainSection
from loratune.run import RunDir
from loratune.training.checkpoint import (
    TRAINER_STATE,
    load_adapter_weights,
    load_optimizer,
    load_random,
    save_checkpoint,
)
from loratune.training.loss import SupervisedLoss
from loratune.training.stock import labelled


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What a trainer trains and evaluates on.

    Attributes:
        train: Training examples.
        eval: Held-out examples; may be empty.
        token_budget: Tokens per micro-batch, `auto` resolved.
    """

    train: Sequence[Example]
    eval: Sequence[Example]
    token_budget: int


@dataclass(slots=True)
class StepMetrics:
    """What is known about the step under way; `metrics.jsonl` gets it when the step is done."""

    loss: float = math.nan
    grad_norm: float = math.nan
    learning_rate: float = math.nan
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    started: float = 0.0


def training_arguments(train: TrainSection, data: TrainingData, run: RunDir) -> dict[str, Any]:
    """The arguments of transformers' trainer that a recipe decides, the same for both engines."""
    steps = num_steps(len(data.train), train.batch_size, train.epochs)
    schedule = "constant_with_warmup" if train.schedule == "constant" and train.warmup_fraction else train.schedule
    return {
        "output_dir": str(run.checkpoints),
        "num_train_epochs": train.epochs,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": math.ceil(train.warmup_fraction * steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch",
        "seed": train.seed,
        "use_cpu": train.device == "cpu",
        **_cadence("eval", train.eval_every if data.eval else "never"),
        **_cadence("save", train.save_every),
        **_cadence("logging", train.log_every),
        "report_to": [name for name in train.report_to if name != "tensorboard"],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_nan_inf_filter": False,  # true would report the average of earlier losses in place of a NaN
        "label_names": ["labels"],
    }


def stock_arguments(train: TrainSection, data: TrainingData, run: RunDir, *, bf16: bool) -> dict[str, Any]:
    """The arguments of TRL's `SFTConfig` on ready-made examples."""
    return {
        **training_arguments(train, data, run),
        "per_device_train_batch_size": train.batch_size,
        "max_length": None,  # the examples are cut already, by the recipe's policy
        "bf16": bf16,
    }


def _tensorboard(train: TrainSection, run: RunDir) -> list[TrainerCallback]:
    """The callback of transformers, writing into the run's directory for trackers instead of among the checkpoints."""
    if "tensorboard" not in train.report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return [TensorBoardCallback(SummaryWriter(str(run.trackers)))]  # type: ignore[no-untyped-call]


def _cadence(name: str, every: str | float) -> dict[str, Any]:
    if isinstance(every, str):
        return {f"{name}_strategy": {"epoch": "epoch", "never": "no"}[every]}
    return {f"{name}_strategy": "steps", f"{name}_steps": every}


class _RunTrainer(Trainer):
    """What both engines share: the order of the examples, checkpoints, token-weighted evaluation, step metrics."""

    keep_checkpoints: int | None
    run_data: TrainingData
    supervised_loss: SupervisedLoss
    step_metrics: StepMetrics
    progress: Progress
    last_evaluation: tuple[int, list[tuple[float, int]]] = (-1, [])
    """The step of the last evaluation, and what `evaluate_nll` returned there."""
    evaluate_seconds = 0.0
    """Spent in evaluations."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Token-weighted negative log-likelihood of the held-out examples."""
        started = time.perf_counter()
        losses = evaluate_nll(self.supervised_loss, self.run_data.eval, self.run_data.token_budget, self.progress)
        self.evaluate_seconds += time.perf_counter() - started
        self.last_evaluation = self.state.global_step, losses
        metrics = {"eval_nll": sum(s for s, _ in losses) / max(1, sum(n for _, n in losses))}
        metrics["eval_loss"] = metrics["eval_nll"]  # the name that transformers' callbacks and trackers look for
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self.step_metrics.grad_norm = float(norm)
        self.step_metrics.learning_rate = self._get_learning_rate()
        return norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        assert self.args.output_dir is not None
        save_checkpoint(
            Path(self.args.output_dir) / str(self.state.global_step),
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            trainer_state=json.dumps(asdict(self.state), indent=2),
            keep=self.keep_checkpoints,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(Path(checkpoint))

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate would cost time, and planning knows better


class _GlobalSteps(Sampler[int]):
    """The numbers of the steps of the epoch that the trainer is in, counted over the whole run."""

    def __init__(self, num_per_epoch: int, steps_done: Callable[[], int]) -> None:
        self._num_per_epoch = num_per_epoch
        self._steps_done = steps_done

    def __len__(self) -> int:
        return self._num_per_epoch

    def __iter__(self) -> Iterator[int]:
        first = self._steps_done() // self._num_per_epoch * self._num_per_epoch
        return iter(range(first, first + self._num_per_epoch))


class _Steps(Dataset[list[MicroBatch]]):
    """Step number, counted over the whole run → its micro-batches."""

    def __init__(self, data: TrainingData, train: TrainSection) -> None:
        self._data, self._train = data, train
        self._lengths = [len(example.input_ids) for example in data.train]
        self.num_per_epoch = num_steps_per_epoch(len(data.train), train.batch_size)

    def __len__(self) -> int:
        return self.num_per_epoch

    def __getitem__(self, number: int) -> list[MicroBatch]:
        epoch, index = divmod(number, self.num_per_epoch)
        plan = EpochPlan(
            lengths=self._lengths,
            batch_size=self._train.batch_size,
            seed=self._train.seed,
            epoch=epoch,
            token_budget=self._data.token_budget,
        )
        (rank,) = plan[index].ranks
        return [collate([self._data.train[i] for i in chosen]) for chosen in rank]


class _Held(Dataset[Example]):
    """The held-out examples, for transformers to see that there are some."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


class FastTrainer(_RunTrainer):
    """One `training_step` is one optimizer step: it loops over the step's micro-batches."""

    def __init__(
        self,
        *,
        model: PeftModel,
        train: TrainSection,
        data: TrainingData,
        loss: SupervisedLoss,
        run: RunDir,
        callbacks: list[TrainerCallback],
        progress: Progress,
    ) -> None:
        arguments = training_arguments(train, data, run)
        self.run_data, self.supervised_loss, self.progress = data, loss, progress
        self.keep_checkpoints = train.keep_checkpoints
        self.step_metrics = StepMetrics()
        steps = _Steps(data, train)
        # The batch size of transformers' own arithmetic is in items of the data set, and an item is a whole step.
        args = TrainingArguments(**arguments, per_device_train_batch_size=1, remove_unused_columns=False)
        super().__init__(
            model=model,
            args=args,
            train_dataset=steps,
            eval_dataset=_Held(data.eval),
            callbacks=[*callbacks, *_tensorboard(train, run)],
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[list[MicroBatch]]:
        steps = self.train_dataset
        assert isinstance(steps, _Steps)
        sampler = _GlobalSteps(steps.num_per_epoch, lambda: self.state.global_step)
        return DataLoader(steps, batch_size=1, sampler=sampler, collate_fn=_only)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def training_step(  # type: ignore[override] # a step's micro-batches, not one batch
        self, model: Any, inputs: list[MicroBatch], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Gradients of one optimizer step; returns its loss: the mean over the step's supervised tokens."""
        started = time.perf_counter()
        model.train()
        num_supervised_tokens = sum(batch.num_supervised_tokens for batch in inputs)
        total = torch.zeros((), device=self.args.device)
        for batch in inputs:
            loss = self.supervised_loss.sum(batch.to(self.args.device)) / num_supervised_tokens
            self.accelerator.backward(loss)
            total += loss.detach()
        self.step_metrics = StepMetrics(
            loss=_finite(float(total), self.state.global_step + 1),
            num_tokens=sum(batch.num_tokens for batch in inputs),
            num_supervised_tokens=num_supervised_tokens,
            started=started,
        )
        return total


class ReferenceTrainer(_RunTrainer, SFTTrainer):
    """The stock `SFTTrainer` on the same examples in the same order: the plain path that the fast one must equal."""

    def __init__(
        self,
        *,
        model: PeftModel,
        train: TrainSection,
        data: TrainingData,
        loss: SupervisedLoss,
        run: RunDir,
        callbacks: list[TrainerCallback],
        progress: Progress,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.run_data, self.supervised_loss, self.progress = data, loss, progress
        self.keep_checkpoints = train.keep_checkpoints
        self.step_metrics = StepMetrics()
        self._order = _ExampleOrder(len(data.train), train, lambda: self.state.global_step)
        args = SFTConfig(**stock_arguments(train, data, run, bf16=model.get_base_model().dtype == torch.bfloat16))
        SFTTrainer.__init__(
            self,
            model=model,
            args=args,
            train_dataset=labelled(data.train),
            eval_dataset=labelled(data.eval) if data.eval else None,
            processing_class=tokenizer,
            callbacks=[*callbacks, *_tensorboard(train, run)],
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        started = time.perf_counter()
        num_tokens = int(inputs["attention_mask"].sum())
        num_supervised_tokens = int((inputs["labels"][:, 1:] != -100).sum())
        loss: torch.Tensor = SFTTrainer.training_step(self, model, inputs, num_items_in_batch)
        self.step_metrics = StepMetrics(
            loss=_finite(float(loss), self.state.global_step + 1),
            num_tokens=num_tokens,
            num_supervised_tokens=num_supervised_tokens,
            started=started,
        )
        return loss


class _ExampleOrder(Sampler[int]):
    """Example numbers of the epoch that the trainer is in, in the step plan's order."""

    def __init__(self, num_examples: int, train: TrainSection, steps_done: Callable[[], int]) -> None:
        self._num_examples, self._train, self._steps_done = num_examples, train, steps_done

    def __len__(self) -> int:
        return self._num_examples

    def __iter__(self) -> Iterator[int]:
        epoch = self._steps_done() // num_steps_per_epoch(self._num_examples, self._train.batch_size)
        return iter(epoch_order(self._num_examples, seed=self._train.seed, epoch=epoch).tolist())


def evaluate_nll(
    loss: SupervisedLoss, examples: Sequence[Example], token_budget: int, progress: Progress
) -> list[tuple[float, int]]:
    """For each example the sum of -log p over its supervised tokens, in nats, and their number."""
    results: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    was_training = loss.model.training
    loss.model.eval()
    with progress.task("held-out loss", len(examples), "examples") as task:
        for chosen in pack([(i, len(example.input_ids)) for i, example in enumerate(examples)], token_budget):
            batch = collate([examples[i] for i in chosen]).to(loss.model.device)
            counts = [num_supervised(examples[i]) for i in chosen]
            sums = [float(part.double().sum()) for part in torch.split(loss.per_token(batch), counts)]
            for i, total, count in zip(chosen, sums, counts, strict=True):
                results[i] = (total, count)
            task.advance(len(chosen))
    loss.model.train(was_training)
    return results


def _only(items: list[list[MicroBatch]]) -> list[MicroBatch]:
    (item,) = items
    return item


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise RunError(
            f"the loss of step {step} is {loss}",
            fix="lower train.learning_rate, or set model.dtype: float32; checkpoints written before are intact",
        )
    return loss


def resume_state(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
