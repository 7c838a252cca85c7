"""Everything that can be known before the weights load: what will be trained, whether it fits, what is wrong."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.data.batch import num_supervised
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.render import Prompt, render_prompts
from loratune.data.steps import largest_step, num_steps
from loratune.errors import MachineError, RecipeError
from loratune.evaluation.scoring import check_references
from loratune.kernels.cross_entropy import chunk_rows
from loratune.lock import examples_fingerprint, make_lock, model_fingerprint, text_fingerprint
from loratune.model.device import Choice, choose_device, choose_dtype, torch_dtype
from loratune.model.gguf import cache_dir
from loratune.model.load import BaseModel, load_config, load_tokenizer, locate_model, positions_of
from loratune.model.targets import describe_targets, resolve_targets, target_notes
from loratune.planning.memory import MemoryPlan, plan_memory
from loratune.planning.parameters import ParameterCount, count_parameters, skeleton
from loratune.planning.speed import TimePlan, plan_time, training_flops
from loratune.progress import Progress
from loratune.recipe import Recipe
from loratune.run import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 2**31
"""Stands for no limit of an example's tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What `prepare` found out.

    Attributes:
        recipe: With every `auto` resolved.
        choices: Setting → what `auto` became, and why.
        base: Where the base model lies.
        tokenizer: Its tokenizer.
        targets: Full names of the adapted modules.
        targets_in_words: The same for people.
        parameters: Exact counts.
        data: Examples and the data report.
        prompts: The held-out prompts that will be answered; none where the metric is none.
        memory: Bytes by component.
        time: Seconds, and the rate they were computed from.
        num_steps: Optimizer steps of the run.
        warnings: What the user should read before starting.
    """

    recipe: Recipe
    choices: dict[str, Choice]
    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    targets: tuple[str, ...]
    targets_in_words: str
    parameters: ParameterCount
    data: PreparedData
    prompts: tuple[Prompt, ...]
    memory: MemoryPlan
    time: TimePlan
    num_steps: int
    warnings: tuple[str, ...]

    def as_plan(self) -> Record:
        """`plan.json`: what is promised."""
        train = self.data.train
        memory, clock = self.memory, self.time
        return {
            "parameters": {
                "trainable": self.parameters.trainable,
                "total": self.parameters.total,
                "adapter_bytes": self.parameters.adapter_bytes,
                "targets": self.targets_in_words,
            },
            "memory": {
                "peak_bytes": memory.peak_bytes,
                "weights_bytes": memory.weights_bytes,
                "adapter_bytes": memory.adapter_bytes,
                "activation_bytes": memory.activation_bytes,
                "loss_bytes": memory.loss_bytes,
                "process_bytes": memory.process_bytes,
                "token_budget": memory.token_budget,
            },
            "time": {
                "train_seconds": clock.train_seconds,
                "flops": clock.flops,
                "flops_per_second": clock.flops_per_second,
                "num_steps": self.num_steps,
            },
            "data": {
                "num_examples": len(train),
                "num_tokens": sum(len(example.input_ids) for example in train),
                "num_supervised_tokens": sum(num_supervised(example) for example in train),
                "num_eval_examples": len(self.data.eval),
            },
            "choices": {
                name: {"value": choice.value, "reason": choice.reason} for name, choice in self.choices.items()
            },
            "warnings": list(self.warnings),
        }

    def as_lock(self) -> Record:
        """`lock.json`: everything effective, and the fingerprints of all inputs."""
        return make_lock(
            recipe=self.recipe.model_dump(mode="json"),
            choices={name: {"value": choice.value, "reason": choice.reason} for name, choice in self.choices.items()},
            inputs={
                "model": model_fingerprint(self.base.path),
                "model_path": str(self.base.path),
                "model_revision": self.base.revision,
                "template": text_fingerprint(str(self.tokenizer.chat_template)),
                "train": examples_fingerprint(self.data.train),
                "eval": examples_fingerprint(self.data.eval),
            },
            adapter={"targets": self.targets_in_words, "trainable": self.parameters.trainable},
        )


def prepare(recipe: Recipe, progress: Progress) -> Preparation:
    """Find out everything that can be known before the weights load.

    Raises:
        RecipeError: A setting does not fit the model.
        DataError: The data cannot be trained on.
        MachineError: The run does not fit this machine, or the hub cannot be reached.
    """
    _check_trackers(recipe)
    device = choose_device(recipe.train.device)
    base = locate_model(recipe.model, progress)
    config = load_config(base, recipe.model)
    max_length = _max_length(recipe, positions_of(config))
    model = skeleton(config, trust_remote_code=recipe.model.trust_remote_code)
    targets = resolve_targets(model, recipe.lora.targets)
    parameters = count_parameters(model, targets, recipe.lora.r)
    tokenizer = load_tokenizer(base, recipe.model)
    data = prepare_data(
        recipe.data,
        tokenizer,
        max_length=int(max_length.value),
        seed=recipe.train.seed,
        cache=cache_dir() / "examples",
        progress=progress,
    )
    dtype = choose_dtype(recipe.model.dtype, device.value)
    memory = _memory(recipe, config.get_text_config(), parameters, data, dtype.value, device.value)
    choices = {
        "train.device": device,
        "model.dtype": dtype,
        "data.max_length": max_length,
        "train.token_budget": Choice(str(memory.token_budget), _budget_reason(recipe, memory)),
        "train.output_dir": Choice(str(output_dir(recipe))),
    }
    effective = _resolved(recipe, choices)
    _check_disk(effective, parameters, len(data.train))
    return Preparation(
        recipe=effective,
        choices={name: choice for name, choice in choices.items() if choice.reason},
        base=base,
        tokenizer=tokenizer,
        targets=targets,
        targets_in_words=describe_targets(model, recipe.lora.targets),
        parameters=parameters,
        data=data,
        prompts=_prompts(recipe, data, tokenizer),
        memory=memory,
        time=_time(effective, config.get_text_config(), model, parameters, data),
        num_steps=num_steps(len(data.train), recipe.train.batch_size, recipe.train.epochs),
        warnings=(*target_notes(model, recipe.lora.targets), *data.report["notices"], *_advice(effective, data)),
    )


def _check_trackers(recipe: Recipe) -> None:
    missing = [name for name in recipe.train.report_to if find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"train.report_to names {', '.join(missing)}, which is not installed",
            fix=f"pip install {' '.join(missing)}",
        )


def output_dir(recipe: Recipe) -> Path:
    """The run directory; `auto` is named after the model, as in the seed's script."""
    if recipe.train.output_dir != "auto":
        return Path(recipe.train.output_dir)
    name = recipe.model.name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return Path("__models") / f"{name}-lora-fine-tuned"


def _prompts(recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, ...]:
    if recipe.evaluate.metric == "none":
        return ()
    prompts = render_prompts(
        data.eval_conversations[: recipe.evaluate.samples], tokenizer, thinking=recipe.data.thinking
    )
    check_references(recipe.evaluate.metric, prompts)
    return tuple(prompts)


def _max_length(recipe: Recipe, positions: int | None) -> Choice:
    wanted = recipe.data.max_length
    if wanted == "auto":
        if positions is None:
            return Choice(str(NO_LIMIT), "the model's config states no limit")
        return Choice(str(positions), "the positions of the model")
    if positions is not None and int(wanted) > positions:
        if "max_length" not in recipe.data.model_fields_set:  # nobody asked for the default
            return Choice(str(positions), f"the positions of the model; the default is {wanted}")
        raise RecipeError(
            f"data.max_length is {wanted}, the model has {positions} positions",
            fix=f"data.max_length={positions} or auto",
        )
    return Choice(str(wanted))


def _memory(
    recipe: Recipe, config: Any, parameters: ParameterCount, data: PreparedData, dtype: str, device: str
) -> MemoryPlan:
    wanted = recipe.train.token_budget
    lengths = [len(example.input_ids) for example in data.train]
    return plan_memory(
        total_parameters=parameters.total,
        trainable_parameters=parameters.trainable,
        num_adapted=len(parameters.per_module),
        r=recipe.lora.r,
        config=config,
        dtype_bytes=torch_dtype(dtype).itemsize,
        device=device,
        loss_chunk_bytes=chunk_rows(config.vocab_size) * config.vocab_size * 4,
        longest=max(lengths),
        largest_step=largest_step(lengths, batch_size=recipe.train.batch_size, seed=recipe.train.seed),
        wanted_budget=None if wanted == "auto" else int(wanted),
    )


def _budget_reason(recipe: Recipe, memory: MemoryPlan) -> str:
    if recipe.train.token_budget != "auto":
        return ""
    return f"tokens per micro-batch, {memory.activation_bytes / 2**20:,.0f} MiB of activations"


def _time(recipe: Recipe, config: Any, model: Any, parameters: ParameterCount, data: PreparedData) -> TimePlan:
    head = model.get_output_embeddings()
    head_parameters = head.weight.numel() if head is not None else 0
    tied = bool(getattr(config, "tie_word_embeddings", False))
    embeddings = head_parameters if tied else 2 * head_parameters
    flops = recipe.train.epochs * training_flops(
        matmul_parameters=parameters.total - parameters.trainable - embeddings,
        head_parameters=head_parameters,
        trainable_parameters=parameters.trainable,
        num_tokens=sum(len(example.input_ids) for example in data.train),
        num_supervised=sum(num_supervised(example) for example in data.train),
    )
    return plan_time(
        flops, device=recipe.train.device, dtype=torch_dtype(recipe.model.dtype), width=int(config.hidden_size)
    )


def _resolved(recipe: Recipe, choices: dict[str, Choice]) -> Recipe:
    """The recipe with every `auto` replaced by what it became."""
    values = recipe.model_dump()
    for name, choice in choices.items():
        section, _, field = name.partition(".")
        is_number = name in ("data.max_length", "train.token_budget")
        values[section][field] = int(choice.value) if is_number else choice.value
    return Recipe.parse(values)


def _check_disk(recipe: Recipe, parameters: ParameterCount, num_examples: int) -> None:
    """Adapter and two moments in each checkpoint, all in float32."""
    saves = _num_saves(recipe, num_steps(num_examples, recipe.train.batch_size, recipe.train.epochs))
    kept = min(saves, recipe.train.keep_checkpoints or saves) + 1  # one more is written before the oldest goes
    needed = kept * parameters.trainable * 12 + parameters.adapter_bytes + 50 * 2**20
    folder = Path(recipe.train.output_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{kept} checkpoints and the adapter need {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free",
            file=folder,
            fix="train.keep_checkpoints=1, train.save_every=never, or another train.output_dir",
        )


def _num_saves(recipe: Recipe, steps: int) -> int:
    every = recipe.train.save_every
    if every == "never":
        return 0
    if every == "epoch":
        return max(1, round(recipe.train.epochs))
    assert not isinstance(every, str)
    return max(1, round(1 / every)) if every < 1 else max(1, steps // int(every))


def _advice(recipe: Recipe, data: PreparedData) -> list[str]:
    """Settings that are known to be weak, each with its reason and a better value. Nothing is changed."""
    train = recipe.train
    steps = num_steps(len(data.train), train.batch_size, train.epochs)
    notes = []
    if train.learning_rate < 1e-4:
        notes.append(
            f"train.learning_rate {train.learning_rate:g} is low for LoRA, whose best rate is about ten times that of "
            "full fine-tuning (Schulman et al. 2025); try 2e-4"
        )
    if train.warmup_fraction == 0 and train.learning_rate >= 5e-4:
        notes.append(f"train.learning_rate {train.learning_rate:g} without warm-up; try train.warmup_fraction=0.05")
    if train.eval_every == "epoch" and steps / max(1.0, train.epochs) > 2000:
        notes.append(
            f"one evaluation in {steps / max(1.0, train.epochs):,.0f} steps; try train.eval_every=0.05 and "
            "train.save_every=0.05"
        )
    return notes
