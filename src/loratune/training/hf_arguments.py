"""A recipe translated into the arguments of transformers' and TRL's trainers, and the data that a trainer gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import get_scheduler

from loratune.data.steps import num_steps
from loratune.recipe.sections.train import DECAY_FRACTION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loratune.data.examples import Example
    from loratune.data.prepared import Stream
    from loratune.recipe.recipe import TrainSection
    from loratune.run.directory import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The examples that a trainer trains and evaluates on.

    Attributes:
        train: Training examples, or the stream of them.
        known: Training examples, or a sample of the stream.
        eval: Held-out examples; may be empty.
        eval_groups: Source → indices of its held-out examples; empty if there is only one source.
        token_budget: Tokens per micro-batch, `auto` resolved.
        source_of_file: File → source of its training examples; empty if there is only one source.
    """

    train: Sequence[Example] | Stream
    known: Sequence[Example]
    eval: Sequence[Example]
    token_budget: int
    eval_groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    source_of_file: Mapping[str, str] = field(default_factory=dict)


OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "lion": "lion_32bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""Our name → transformers' name; `own_optimizer` has the others."""

MIN_LR_RATE = 0.1
"""The learning rate at the end of `cosine_with_min_lr`, as a fraction of the peak rate."""


def schedule_arguments(train: TrainSection, steps: int) -> dict[str, Any]:
    """Return the arguments of transformers' trainer for the learning-rate schedule of a run of `steps` steps."""
    name = "constant_with_warmup" if train.schedule == "constant" and train.warmup_fraction else train.schedule
    warmup = math.ceil(train.warmup_fraction * steps)
    arguments: dict[str, Any] = {"lr_scheduler_type": name, "warmup_steps": warmup}
    if name == "cosine_with_min_lr":
        arguments["lr_scheduler_kwargs"] = {"min_lr_rate": MIN_LR_RATE}
    if name == "warmup_stable_decay":
        arguments["lr_scheduler_kwargs"] = {
            "num_decay_steps": steps - _stable_steps(train, steps),
            "decay_type": "1-sqrt",
        }
    return arguments


def learning_rate_factor(train: TrainSection, steps: int) -> Callable[[int], float]:
    """Return the schedule of a run of `steps` steps: steps taken → the next one's fraction of the peak rate."""
    arguments = schedule_arguments(train, steps)
    schedule = get_scheduler(
        arguments["lr_scheduler_type"],
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        num_warmup_steps=arguments["warmup_steps"],
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.get("lr_scheduler_kwargs"),
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


def branch_step(train: TrainSection, steps: int) -> int | None:
    """Return the step after which a run can still become a longer one, since its learning rate only falls from there.

    None if the schedule has no such step, or no checkpoints are saved.
    """
    if train.schedule != "warmup_stable_decay" or train.save_every == "never":
        return None
    return _stable_steps(train, steps)


def steps_in_common(one: tuple[TrainSection, int], other: tuple[TrainSection, int]) -> int:
    """Return after how many steps the learning rates of two runs diverge: up to then the runs are the same, bit for
    bit.

    Args:
        one: A run's section of the recipe, and its optimizer steps.
        other: The same of the other run.
    """
    first, second = learning_rate_factor(*one), learning_rate_factor(*other)
    peaks = one[0].learning_rate, other[0].learning_rate
    for done in range(min(one[1], other[1]) + 1):  # the rate of the step after the last one is in its checkpoint too
        if peaks[0] * first(done) != peaks[1] * second(done):
            return max(0, done - 1)
    return min(one[1], other[1])


def fraction_of(count: int, steps: int) -> float:
    """Return the shortest decimal of which `ceil(fraction * steps)` is `count`."""
    for digits in range(18):
        fraction = math.floor(count * 10**digits / steps) / 10**digits
        if fraction and math.ceil(fraction * steps) == count:
            return fraction
    raise AssertionError(f"{count} of {steps} steps are no fraction")


def _stable_steps(train: TrainSection, steps: int) -> int:
    """Return the steps of `warmup_stable_decay` before its decay."""
    return steps - min(math.ceil(DECAY_FRACTION * steps), steps - math.ceil(train.warmup_fraction * steps))


def own_optimizer(train: TrainSection) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Return class and arguments of an optimizer that transformers has no name for; None for the others.

    Muon scales its updates so that AdamW's rates fit (Liu et al. 2025, arXiv 2502.16982: by 0.2·√max(d_out, d_in)).
    """
    if train.optimizer != "muon":
        return None
    return torch.optim.Muon, {"lr": train.learning_rate, "adjust_lr_fn": "match_rms_adamw"}


def training_arguments(train: TrainSection, data: TrainingData, run: RunDir) -> dict[str, Any]:
    """Return the arguments of transformers' trainer that a recipe decides, the same for all engines."""
    steps = num_steps(len(data.train), train.batch_size, train.epochs)
    return {
        "output_dir": str(run.checkpoints),
        **({"num_train_epochs": train.epochs} if train.max_steps is None else {"max_steps": train.max_steps}),
        "learning_rate": train.learning_rate,
        **schedule_arguments(train, steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        **({"optim": _optimizer_name(train)} if train.optimizer in OPTIMIZERS else {}),
        "seed": train.seed,
        "use_cpu": train.device == "cpu",
        **_cadence("eval", train.eval_every if data.eval else "never"),
        **_cadence("save", train.save_every),
        **_cadence("logging", train.log_every),
        "report_to": [],  # `trackers` calls them, so that one that fails does not stop the run
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_nan_inf_filter": False,  # true would log the mean of earlier losses instead of a NaN
        "label_names": ["labels"],
    }


def trl_arguments(train: TrainSection, data: TrainingData, run: RunDir, *, bf16: bool) -> dict[str, Any]:
    """Return the arguments of TRL's `SFTConfig` for tokenized examples."""
    # The fast engine smooths labels and adds noise itself (`loss`, `neftune`).
    only_here = {"neftune_noise_alpha": train.neftune_noise_alpha, "label_smoothing_factor": train.label_smoothing}
    return {
        **training_arguments(train, data, run),
        **{name: value for name, value in only_here.items() if value},
        "per_device_train_batch_size": train.batch_size,
        "max_length": None,  # the examples are truncated already, by the recipe's policy
        "router_aux_loss_coef": 0.0,  # a product of means over a batch, not a sum over tokens: depends on the batching
        "bf16": bf16,
    }


def _optimizer_name(train: TrainSection) -> str:
    """Return transformers' name; on a GPU, AdamW updates all parameters of a group in one launch."""
    fused = train.optimizer == "adamw" and train.device == "cuda"
    return f"{OPTIMIZERS['adamw']}_fused" if fused else OPTIMIZERS[train.optimizer]


def _cadence(name: str, every: str | float) -> dict[str, Any]:
    if isinstance(every, str):
        return {f"{name}_strategy": {"epoch": "epoch", "never": "no"}[every]}
    return {f"{name}_strategy": "steps", f"{name}_steps": every}
