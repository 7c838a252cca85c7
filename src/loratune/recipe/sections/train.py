"""The `train` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from loratune.recipe.checks import check_once, check_regular_expressions, check_train
from loratune.recipe.sections.base import Cadence, Float, Int, Section

Optimizer = Literal["adamw", "adamw_8bit", "lion", "muon", "adafactor", "sgd"]
Schedule = Literal["linear", "cosine", "constant", "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt"]

DECAY_FRACTION = 0.2
"""Fraction of the steps over which `warmup_stable_decay` decays. Hägele et al. 2024 (arXiv 2405.18392) find 10 to 20 %
sufficient."""


class TrainSection(Section):
    """The optimization."""

    output_dir: str = "auto"
    """The run directory. `auto`: `__models/NAME-lora-fine-tuned`."""

    epochs: Float = Field(default=3, gt=0)
    """The number of passes over the training data. May be fractional."""

    max_steps: Int | None = Field(default=None, ge=1)
    """The number of optimizer steps; if set, it overrides `epochs`, and the learning-rate schedule ends with it.
    `null`: as many as `epochs` gives."""

    learning_rate: Float = Field(default=5e-5, gt=0)
    """The peak learning rate (LR) of the schedule."""

    batch_size: Int = Field(default=8, ge=1)
    """The effective (global) batch size: examples per optimizer step, over all micro-batches and devices. Gradient
    accumulation follows from it and `token_budget`."""

    optimizer: Optimizer = "adamw"
    """`adamw`: two moments for each trained parameter. `adamw_8bit`: the same with 8-bit moments for matrices of 4,096
    elements and more, by bitsandbytes. `lion`: sign of a momentum, half of AdamW's memory, by bitsandbytes; use a third
    to a tenth of AdamW's learning rate. `muon`: orthogonalized momentum of each matrix, half of AdamW's memory, at
    AdamW's learning rates. `adafactor`: factored second moments, a small fraction of AdamW's memory, at AdamW's
    learning rates. `sgd`: plain gradients without momentum or optimizer memory; use a far higher learning rate."""

    lora_plus_ratio: Float = Field(default=1.0, ge=1)
    """LoRA+: the learning rate of the B matrices as a multiple of that of the A matrices, which is `learning_rate`. 1:
    the same rate for both."""

    schedule: Schedule = "linear"
    """The learning-rate schedule (LR scheduler) after the warm-up: decay to zero (`linear`, `cosine`), no decay
    (`constant`), cosine decay to a tenth of the peak (`cosine_with_min_lr`), constant and then 1-sqrt decay to zero
    over the last fifth of the steps (`warmup_stable_decay`, WSD), or decay as 1/√step, with the warm-up as the unit of
    time (`inverse_sqrt`)."""

    warmup_fraction: Float = Field(default=0.0, ge=0, lt=1)
    """The fraction of the steps over which the learning rate rises linearly from zero (warm-up ratio)."""

    weight_decay: Float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapter's weights."""

    max_grad_norm: Float = Field(default=1.0, ge=0)
    """Gradient clipping: gradients with a larger global norm are scaled down to this norm. 0: no clipping."""

    seed: Int = Field(default=42, ge=0, lt=2**32)
    """The random seed for the adapter's initial weights, the order of the examples, and dropout."""

    engine: Literal["fast", "trl"] = "fast"
    """`fast`: flat micro-batches without padding, packed attention, loss on trained tokens only. `trl`: the stock
    `SFTTrainer` of TRL on the same rows, as a reference."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train. `auto`: CUDA if available, else Apple's MPS, else the CPU."""

    token_budget: Int | Literal["auto"] = Field(default="auto", union_mode="left_to_right")
    """The maximum number of tokens per micro-batch (micro-batch size); a longer example is a micro-batch of its own.
    Affects memory and speed; losses stay the same up to rounding."""

    share_prefixes: bool | Literal["auto"] = "auto"
    """Whether tokens that several sequences of a step begin with (system prompt, tool schemas, the prompt of a pair) go
    through the model only once. Losses and gradients stay the same up to rounding; with `lora.dropout`, equal prefixes
    of a step have one mask. `auto`: if enough of the tokens are shared."""

    compile: bool | Literal["auto"] = "auto"
    """Whether to run the decoder layers and the loss through `torch.compile`. `auto`: if the run is long enough to
    repay the compile time and a C++ compiler is installed."""

    recompute: Int | Literal["auto"] = Field(default="auto", union_mode="left_to_right")
    """Gradient checkpointing (activation checkpointing): how many decoder layers keep only their input and recompute
    the rest during the backward pass, which takes less memory and more time. `auto`: as few as fit into the free
    memory."""

    eval_every: Cadence = Field(default="epoch", union_mode="left_to_right")
    """When to evaluate the held-out loss: every `epoch`, `never`, every N steps, or, below 1, after every such fraction
    of the run."""

    save_every: Cadence = Field(default="epoch", union_mode="left_to_right")
    """When to save a checkpoint; values as for `eval_every`."""

    log_every: Cadence = Field(default="epoch", union_mode="left_to_right")
    """When to print a line and report to the trackers; values as for `eval_every`. `metrics.jsonl` records every step
    regardless."""

    keep_checkpoints: Int | None = Field(default=None, ge=1)
    """How many of the newest checkpoints to keep, in addition to the one with the lowest held-out loss (save total
    limit). `null`: all."""

    final_adapter: Literal["last", "best"] = "last"
    """Which adapter the run ends with: that of the `last` step, or that of the `best` checkpoint, the one with the
    lowest held-out loss (load best model at end). `best.json` names the best checkpoint either way."""

    on_bad_step: Literal["error", "skip"] = "error"
    """What happens when a step's loss or gradient is NaN or infinite; such a step is never applied, and its examples
    are reported. `error`: the run ends; `skip`: it continues with the next step."""

    max_skipped_steps: Int = Field(default=10, ge=0)
    """How many steps of the run `on_bad_step: skip` may skip before the run ends with an error."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the base model: `ddp`, each holds a full copy; `fsdp`, each holds a shard of every
    decoder layer and gathers one layer at a time. `auto`: `ddp` if a device can hold the base. Affects memory and
    speed; losses stay the same up to rounding."""

    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers to log to."""

    learning_rate_pattern: dict[str, Annotated[Float, Field(gt=0)]] = Field(default={})
    """Peak learning rates of single modules, overriding `learning_rate`. Each key is a regular expression that matches
    the last parts or the full name of a module: `{embed_tokens: 1e-5}`. The first match counts."""

    early_stopping: Int | None = Field(default=None, ge=1)
    """Early-stopping patience: the run ends after this many evaluations in a row without a lower held-out loss. The
    learning-rate schedule stays that of the full run. Combine it with `final_adapter: best` to end with the best
    adapter. `null`: all steps are taken."""

    neftune_noise_alpha: Float = Field(default=0.0, ge=0)
    """NEFTune: adds uniform noise to the embeddings during training, of at most this / √(tokens of the example × hidden
    size). A usual value is 5. 0: no noise."""

    average_checkpoints: Int | None = Field(default=None, ge=2)
    """Checkpoint averaging: the run ends with the mean of the adapters of this many most recent checkpoints instead of
    the last step's adapter. These checkpoints are kept in addition to `keep_checkpoints`. `null`: no averaging."""

    label_smoothing: Float = Field(default=0.0, ge=0, lt=1)
    """The share of each target's probability that is spread evenly over the vocabulary. Applies to the training loss
    only, not to the held-out loss. 0: none."""

    @field_validator("learning_rate_pattern")
    @classmethod
    def _check_patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_regular_expressions("train.learning_rate_pattern", value)

    @field_validator("report_to")
    @classmethod
    def _check_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return cast("tuple[str, ...]", check_once("train.report_to", value))

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_train(self, DECAY_FRACTION)
        return self
