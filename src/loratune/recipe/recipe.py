"""The recipe: every setting of a run, declared once.

A field is declared by its name, its type, its default, and the docstring under it, which states its unit and what it
does. `--help`, the JSON schema, the reference page and the comments of generated recipes are derived from here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loratune.recipe.checks import (
    Contradiction,
    check_beside,
    check_data,
    check_held_out,
    check_muon,
    check_no_truth,
    check_once,
    check_quantization,
    check_regular_expressions,
    check_train,
)
from loratune.recipe.roles import TrainOn
from loratune.recipe.tasks import TaskName, check_task
from loratune.recipe.yaml import (
    apply_override,
    hoist_task,
    read_yaml,
    refuse_secrets,
    shown,
    translate_validation_error,
)

Cadence = Literal["epoch", "never"] | int | float


class Section(BaseModel):
    """A part of the recipe: immutable, and strict about names and types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class Source(Section):
    """Where rows come from."""

    name: str
    """A file (`.jsonl`, `.json`, `.parquet`, `.csv`), a folder of such files, or the id of a hub data set."""

    config: str | None = None
    """The configuration of a hub data set (its `name` argument in `load_dataset`)."""

    split: str | None = None
    """The split of a hub data set; `train` when not given."""

    weight: float = Field(default=1.0, gt=0)
    """How many times the rows of this source are seen per epoch: 2.5 is each of them twice, and a seeded half of them a third time, the
    same half in every epoch. The mixture is rows × weight of each source."""


def _as_source(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_as_source(item) for item in value)
    return (_as_source(value),)


def _as_eval(value: Any) -> Any:
    if value in ("auto", "none") or (isinstance(value, float | int) and not isinstance(value, bool)):
        return value
    return _as_sources(value)


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]

SEED_DATASET = Source(name="HuggingFaceTB/smoltalk", config="all", split="train")


class ModelSection(Section):
    """The base model."""

    name: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """A hub id, a folder, a `.gguf` file, or `package:NAME/FILE.gguf` for a file inside an installed package."""

    revision: str | None = None
    """The branch, tag or commit of a hub model. A branch is resolved to its commit and recorded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type of the frozen base weights. `auto`: bfloat16 where this machine multiplies it faster, else float32."""

    quantization: Literal[
        "none", "fp8", "nf4", "int8", "int8_weight_only", "int4_weight_only", "float8_weight_only"
    ] = "none"
    """The frozen linear layers in fewer bits; the adapter stays in float32. `nf4`: 4 bits a weight (QLoRA), `int8`: 8 bits, inputs
    too, by bitsandbytes. `int8_weight_only`, `int4_weight_only` and `float8_weight_only`: only the weights, by torchao. `fp8`: products in
    8-bit floats, on NVIDIA GPUs of Hopper's generation and later; its weights take as many bytes as in bfloat16, since each is kept in two
    layouts."""

    trust_remote_code: bool = False
    """Whether Python files that come with the model may run on this machine."""

    task: TaskName = "causal_lm"
    """What the model learns: `causal_lm`, to write text; `sequence_classification`, to name the class of a text. `task:` by itself,
    outside of the sections, says the same."""


Column = Literal[
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "system", "tools",
    "sentence1", "sentence2", "label",
]  # fmt: skip


class DataSection(Section):
    """The conversations, and which of their tokens are trained."""

    train: Sources = (SEED_DATASET,)
    """The training data: a source, or a list of sources with weights."""

    eval: Annotated[Literal["auto", "none"] | float | tuple[Source, ...], BeforeValidator(_as_eval)] = "auto"
    """The held-out data: a source, the fraction of the training conversations to hold out, or `none`. `auto`: the
    `test` split of a hub data set that is named with config or split and has one, else a fraction of 0.05."""

    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"] = "auto"
    """The format of the rows. `auto`: detected from all rows."""

    columns: dict[Column, str] = {}
    """Columns of the rows whose names are not those of the format: `{prompt: mr, completion: ref}` reads column `mr` as the
    prompt and `ref` as the completion."""

    train_on: TrainOn = Field(default="assistant", union_mode="left_to_right")
    """The trained tokens: `assistant`, every answer with its stop token; `last`, the last answer; `all`, every token; or of a list of
    roles, as `[user, assistant]`, every message. One with `train: false` (or `weight: 0`) is only context."""

    thinking: Literal["keep", "strip", "error"] = "keep"
    """Answers with `<think>…</think>`: `keep` trains the thoughts even where the chat template would drop them, `strip`
    removes them from the data, `error` refuses such rows."""

    special_tokens_in_text: Literal["error", "as_text"] = "error"
    """The names of special tokens in texts, such as `<|im_end|>` in a user's message, which tokenizers read as the tokens:
    `error` refuses such rows of chats (in plain text they are read as tokens), `as_text` trains them as ordinary text."""

    max_length: int | Literal["auto"] = Field(default=1024, union_mode="left_to_right")
    """The longest example, in tokens. `auto`: the positions of the model."""

    on_long: Literal["error", "truncate", "drop"] = "truncate"
    """Examples longer than `max_length`: refuse to start, cut the end off, or leave them out. Both are counted."""

    on_bad_row: Literal["error", "skip"] = "error"
    """Rows that cannot be trained on: refuse to start, or leave them out and list them in `data.json`."""

    streaming: bool | Literal["auto"] = "auto"
    """Whether training starts before all rows are looked at: each is read, verified and tokenised shortly before its step,
    and what is said beforehand comes from a sample. For JSON lines and hub data sets. `auto`: from 100,000 rows on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_data(self)
        return self


Variant = Literal["plain", "rslora", "dora", "pissa", "olora", "eva", "loftq"]
TargetPreset = Literal["minimal", "balanced", "attention", "complete"]


class LoraSection(Section):
    """The adapter: h = Wx + (alpha/r)·B·A·dropout(x), with W frozen."""

    r: int = Field(default=16, ge=1)
    """The rank: the inner dimension of B·A. A matrix of d×k gets r·(d+k) trainable parameters."""

    alpha: float = Field(default=32, gt=0)
    """The scale of the update is alpha/r. Often twice the rank."""

    dropout: float = Field(default=0.05, ge=0, lt=1)
    """The fraction of the adapter's inputs that is set to zero during training."""

    targets: TargetPreset | tuple[str, ...] = Field(default="balanced", union_mode="left_to_right")
    """The adapted matrices: `minimal` (query), `balanced` (query, value), `attention` (query, key, value, output),
    `complete` (attention and feed-forward), or a list of module names."""

    layers: str | tuple[int, ...] = Field(default="all", union_mode="left_to_right")
    """The decoder layers whose matrices are adapted: `all`, `first 4`, `last 4`, or a list of numbers from 0 on."""

    variant: Variant = "plain"
    """How the adapter is scaled and begins: `rslora`, by alpha/√r; `dora`, with a trained magnitude for each output;
    `pissa`, A and B from the largest singular values of W; `olora`, from its QR decomposition, both saved as a plain adapter of rank
    2r; `eva`, A from the inputs that the training data makes; `loftq`, from what nf4 took away."""

    start_from: str | None = None
    """A saved adapter that training goes on from: a folder in PEFT's format, or a hub id. Rank, alpha, variant and matrices must
    be the recipe's."""

    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Ranks of single matrices in the place of `r`: a regular expression of a module's last parts or whole name, and its rank, as
    `{o_proj: 4, 'layers.0.mlp.*': 64}`. Of several that match, the first counts."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """The same in the place of `alpha`. Without it, a matrix of another rank has another alpha/r."""

    modules_to_save: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Modules that are trained whole beside the adapter and saved with it, such as `embed_tokens`, `lm_head` or `norm`, by their
    last dotted parts. Of a head that is tied to the embedding, both are trained as one."""

    new_tokens: tuple[Annotated[str, Field(min_length=1, pattern=r"^\S+$")], ...] = ()
    """Tokens to add to the tokenizer, such as `<|tool|>`: their rows of embedding and output head are trained and saved with the
    adapter, the other rows stay as they are."""

    target_parameters: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Parameters that belong to no linear module and are adapted too, such as `mlp.experts.gate_up_proj`, the weights of all experts
    of a layer: each expert gets an A and a B of its own. Without dropout."""

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str) and not re.fullmatch(r"all|(first|last) [1-9][0-9]*", value):
            raise Contradiction(
                f"lora.layers is {value}", fix="give all, first N, last N, or a list of numbers from 0 on"
            )
        return value

    @field_validator("targets", "layers", "modules_to_save", "new_tokens", "target_parameters")
    @classmethod
    def _check_once(cls, value: Any, info: ValidationInfo) -> Any:
        return check_once(f"lora.{info.field_name}", value)

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return check_regular_expressions(f"lora.{info.field_name}", value)


Optimizer = Literal["adamw", "adamw_8bit", "lion", "muon", "adafactor", "sgd"]
Schedule = Literal["linear", "cosine", "constant", "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt"]

DECAY_FRACTION = 0.2
"""The part of the steps over which `warmup_stable_decay` goes down: Hägele et al. 2024 (arXiv 2405.18392) find 10 to 20 %
enough."""


class TrainSection(Section):
    """The optimisation."""

    output_dir: str = "auto"
    """The run directory. `auto`: `__models/NAME-lora-fine-tuned`."""

    epochs: float = Field(default=3, gt=0)
    """How often each training example is seen. May be a fraction."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """The highest learning rate of the schedule."""

    batch_size: int = Field(default=8, ge=1)
    """The examples of one optimizer step, over all micro-batches and devices."""

    optimizer: Optimizer = "adamw"
    """`adamw`: two moments of each trained parameter. `adamw_8bit`: the same in a byte each, for matrices of 4,096 numbers and more;
    by bitsandbytes. `lion`: the sign of a momentum, half of AdamW's memory, by bitsandbytes; wants a third to a tenth of its rate. `muon`:
    the momentum of each matrix made orthogonal, half of the memory, for AdamW's rates. `adafactor`: second moments by rows and
    columns alone, for a small part of that memory; wants rates as AdamW's. `sgd`: plain gradients without momentum and
    without memory; wants far higher rates."""

    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """LoRA+: the matrices B learn this many times as fast as A, whose highest rate is `learning_rate`. 1: equally fast."""

    schedule: Schedule = "linear"
    """How the learning rate goes on after the warm-up: down to zero (`linear`, `cosine`), `constant`, by a cosine down to a tenth
    (`cosine_with_min_lr`), constant and over the last fifth of the steps down to zero by 1-sqrt (`warmup_stable_decay`), or as 1/√step
    (`inverse_sqrt`, whose unit is the warm-up)."""

    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """The fraction of the steps over which the learning rate rises from zero."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on the adapter's weights."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm. 0: never."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Decides the adapter's initial weights, the order of the examples, and dropout."""

    engine: Literal["fast", "trl"] = "fast"
    """`fast`: flat micro-batches, packed attention, loss on supervised tokens only. `trl`: the stock `SFTTrainer` on the
    same rows, as reference."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train. `auto`: CUDA, else Apple's MPS, else the CPU."""

    token_budget: int | Literal["auto"] = Field(default="auto", union_mode="left_to_right")
    """The most tokens of one micro-batch; a longer example is a micro-batch of its own. Decides memory and speed, never
    the result."""

    compile: bool | Literal["auto"] = "auto"
    """Whether the repeated decoder layer and the loss run compiled, by torch.compile. `auto`: when the run is long enough
    to repay the seconds that compiling takes, and a C++ compiler is there."""

    recompute: int | Literal["auto"] = Field(default="auto", union_mode="left_to_right")
    """How many decoder layers keep only their input and compute the rest again backwards, which takes less memory and
    more time. `auto`: as few as the free memory allows."""

    eval_every: Cadence = Field(default="epoch", union_mode="left_to_right")
    """When the held-out loss is measured: every `epoch`, `never`, every N steps, or every fraction of the run below 1."""

    save_every: Cadence = Field(default="epoch", union_mode="left_to_right")
    """When a checkpoint is written: as `eval_every`."""

    log_every: Cadence = Field(default="epoch", union_mode="left_to_right")
    """When a line is printed and trackers are told: as `eval_every`. `metrics.jsonl` has every step all the same."""

    keep_checkpoints: int | None = Field(default=None, ge=1)
    """How many of the newest checkpoints are kept, beside the one with the lowest held-out loss. `null`: all."""

    final_adapter: Literal["last", "best"] = "last"
    """The adapter that the run ends with: of the `last` step, or of the `best` checkpoint, the one with the lowest held-out
    loss. Which one that is stands in `best.json` either way."""

    on_bad_step: Literal["error", "skip"] = "error"
    """A step whose loss or gradient is NaN or infinite is never applied. `error`: the run ends there; `skip`: it goes on
    with the next one. Either way the examples are named."""

    max_skipped_steps: int = Field(default=10, ge=0)
    """How many steps may be skipped in the whole run with `on_bad_step: skip`, before it ends."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """What each of several processes holds: `ddp`, the whole base; `fsdp`, a part of each decoder layer, and all of one while it
    computes. `auto`: `ddp` where a device holds the base. Decides memory and speed, never the result."""

    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers to report to."""

    learning_rate_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Highest rates of single modules in the place of `learning_rate`: a regular expression of a module's last parts or whole name, and
    its rate, as `{embed_tokens: 1e-5}`. Of several that match, the first counts."""

    early_stopping: int | None = Field(default=None, ge=1)
    """After how many evaluations without a lower held-out loss the run ends. The learning rates stay those of the whole run.
    `final_adapter: best` ends it with the adapter of the lowest loss. `null`: all steps are taken."""

    neftune_noise_alpha: float = Field(default=0.0, ge=0)
    """NEFTune: in training, each number of an example's embeddings gets uniform noise of at most this / √(tokens of the example ×
    width of the model). 5 is usual; 0: none."""

    average_checkpoints: int | None = Field(default=None, ge=2)
    """The run ends with the mean of the adapters of this many last checkpoints of `save_every`, instead of the last step's. They are
    kept beside `keep_checkpoints`. `null`: no mean."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """The part of each trained token's target that is spread evenly over the vocabulary. The training loss is that of the smoothed
    targets, the held-out loss is without. 0: none."""

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


class EvaluateSection(Section):
    """What is measured on the held-out data, base against tuned."""

    metric: Literal["none", "exact_match", "json", "contains", "bleu"] = "none"
    """How a generated answer is scored against its references: `exact_match`, the same text; `json`, the same JSON value;
    `contains`, a reference occurs in the answer; `bleu`, n-grams of all answers together, by sacrebleu; `none`, no answers
    are generated, only the loss is measured."""

    samples: int = Field(default=100, ge=1)
    """How many held-out prompts are answered, from the first on. Conversations that differ in their last answer only are one
    prompt with several references."""

    max_new_tokens: int = Field(default=256, ge=1)
    """The longest generated answer, in tokens."""

    forgetting: Annotated[Literal["none"] | tuple[Source, ...], BeforeValidator(_as_eval)] = "none"
    """Data of another kind, whose loss should not rise by training: a source, a list of sources, or `none`."""


class Recipe(Section):
    """Everything that decides a run. Load one with `Recipe.load`."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="before")
    @classmethod
    def _check_truth(cls, values: Any) -> Any:
        return check_no_truth(values, cls)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_task(self)
        check_quantization(self)
        check_beside(self)
        check_muon(self)
        check_held_out(self)
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Read a recipe from a YAML file.

        Args:
            path: The file.
            overrides: Settings that replace those of the file, as `section.field=value`, the value in YAML.

        Raises:
            RecipeError: The file cannot be read, or a setting is unknown, of the wrong type, or contradicts another.
        """
        path = Path(path)
        values, lines = read_yaml(path)
        for override in overrides:
            apply_override(values, override, lines)
        return cls.parse(values, file=path, lines=lines)

    @classmethod
    def parse(
        cls, values: dict[str, Any], *, file: str | Path | None = None, lines: dict[str, int] | None = None
    ) -> Self:
        """Validate nested dictionaries, as they come from YAML or JSON.

        Args:
            values: Sections with their fields.
            file: Named in error messages.
            lines: The line of each `section.field`, for error messages.

        Raises:
            RecipeError: A setting is unknown, of the wrong type, or contradicts another.
        """
        refuse_secrets(shown(values, most=1_000_000), None)
        try:
            return cls.model_validate(hoist_task(values, lines or {}))
        except ValidationError as error:
            raise translate_validation_error(error, cls, Source, file, lines or {}) from None

    def to_yaml(self) -> str:
        """All settings as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def origins(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, str]:
    """Where each setting that was given was given: `section.field` → `FILE:LINE` or `command line`.

    Settings that are not named have their default.

    Raises:
        RecipeError: As `Recipe.load`.
    """
    values, lines = read_yaml(Path(path))
    found = {name: f"{path}:{line}" for name, line in lines.items() if name.count(".") == 1}
    for override in overrides:
        apply_override(values, override, lines)
        found[override.partition("=")[0].strip()] = "command line"
    return found


TARGET_PRESETS: tuple[str, ...] = get_args(TargetPreset)
VARIANTS: tuple[str, ...] = get_args(Variant)
