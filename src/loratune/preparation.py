"""Everything that can be known before the weights load: what will be trained, whether it fits, what is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratune import world
from loratune.advising import advice_facts
from loratune.class_preparation import class_positions, prepare_classes
from loratune.data.batch import num_supervised
from loratune.data.mixture import mixture
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.prompts import Prompt, longest_answer, render_prompts
from loratune.data.render import Example
from loratune.data.steps import num_steps
from loratune.data.stream import MANY_ROWS, can_stream, open_tables, stream_data
from loratune.early_checks import (
    check_disk,
    check_files,
    check_occasions,
    check_optimizer,
    check_output,
    check_prompts,
    check_sharded,
    check_start,
    check_trackers,
    check_trained,
    check_vocabulary,
    occasion_notes,
)
from loratune.errors import RecipeError
from loratune.evaluation.scoring import check_metric, check_references
from loratune.lock import examples_fingerprint, make_lock, model_fingerprint, text_fingerprint
from loratune.model.beginning import adapter_fingerprint, base_notes
from loratune.model.classifier import Classes
from loratune.model.device import Choice, choose_device, choose_dtype, free_memory, torch_dtype
from loratune.model.gguf import cache_dir
from loratune.model.load import BaseModel, load_config, load_tokenizer, locate_model, positions_of
from loratune.model.new_tokens import add_new_tokens, grow, growing_parameters, unseen_tokens
from loratune.model.prequantised import check_checkpoint
from loratune.model.quantised import PACKED
from loratune.model.targets import resolve_targets, target_notes
from loratune.model.variants import rank_notes, variant_notes
from loratune.model.weights import bytes_to_convert
from loratune.planning.advice import Advice, give_advice
from loratune.planning.cluster import Cluster
from loratune.planning.cost import Place
from loratune.planning.devices import Device, device_notes
from loratune.planning.estimate import estimate
from loratune.planning.memory import MemoryPlan, free_bytes, resident_bytes
from loratune.planning.parameters import ParameterCount, count_parameters, skeleton, trained_in_words
from loratune.planning.presets import PresetPlan, count_presets, plan_preset
from loratune.planning.quantised import check_quantised, quantised_place, quantization_notes
from loratune.planning.scaling import Scaling, scale, strategy_choice, strategy_for
from loratune.planning.speed import StepProbe, TimePlan, with_probe
from loratune.progress import Progress
from loratune.recipe import Recipe
from loratune.recipe_tasks import is_classification, refuse_classifier
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
        tokenizer: Its tokenizer, with the new tokens.
        new_tokens: The numbers of these.
        targets: Full names of the adapted modules.
        targets_in_words: The same for people.
        parameters: Exact counts.
        presets: The four target presets side by side.
        data: Examples and the data report.
        prompts: The held-out prompts that will be answered; none where the metric is none.
        start: The folder of the adapter to begin with; None where it is a fresh one.
        forgetting: The examples of another kind; none where `evaluate.forgetting` is none.
        memory: Bytes by component.
        time: Seconds, and the rate they were computed from.
        num_steps: Optimizer steps of the run.
        warnings: What the user should read before starting.
        advice: What an expert would change.
        device: The named device that the plan is for; None for this machine.
        scaling: The run on more and more devices; None where the plan is for one.
        probe: What real steps took; None where none were run.
        classes: Of a classifier; None where the model writes text.
    """

    recipe: Recipe
    choices: dict[str, Choice]
    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    new_tokens: tuple[int, ...]
    targets: tuple[str, ...]
    targets_in_words: str
    parameters: ParameterCount
    presets: tuple[PresetPlan, ...]
    data: PreparedData
    prompts: tuple[Prompt, ...]
    start: Path | None
    forgetting: tuple[Example, ...]
    memory: MemoryPlan
    time: TimePlan
    num_steps: int
    warnings: tuple[str, ...]
    advice: tuple[Advice, ...]
    device: Device | None
    scaling: Scaling | None = None
    probe: StepProbe | None = None
    classes: Classes | None = None

    def with_probe(self, probe: StepProbe) -> Preparation:
        """The same with the times that the probe's speed makes."""
        tokens = self.recipe.train.epochs * sum(len(example.input_ids) for example in self.data.train)
        time = with_probe(self.time, probe, tokens)
        return replace(
            self,
            probe=probe,
            time=time,
            presets=tuple(preset.scaled(time.train_seconds / self.time.train_seconds) for preset in self.presets),
        )

    def as_plan(self) -> Record:
        """`plan.json`: what is promised."""
        train, scale = self.data.train, self.data.scale
        memory, clock = self.memory, self.time
        num_tokens = round(scale * sum(len(example.input_ids) for example in train))
        return {
            "parameters": {
                "trainable": self.parameters.trainable,
                "total": self.parameters.total,
                "share": self.parameters.trainable / self.parameters.total,
                "adapter_bytes": self.parameters.adapter_bytes,
                "targets": self.targets_in_words,
                "per_module": [
                    {
                        "name": item.matrix.name,
                        "d_in": item.matrix.d_in,
                        "d_out": item.matrix.d_out,
                        "trainable": item.trainable,
                    }
                    for item in self.parameters.per_module
                ],
                "whole": [
                    {"name": item.name, "shapes": [list(shape) for shape in item.shapes], "trainable": item.trainable}
                    for item in self.parameters.whole
                ],
            },
            "presets": {preset.count.name: preset.as_record() for preset in self.presets},
            "memory": {"peak_bytes": memory.peak_bytes, **asdict(memory)},
            "time": {
                **asdict(clock),
                "tokens_per_second": self.recipe.train.epochs * num_tokens / clock.train_seconds,
                "num_steps": self.num_steps,
                "is_upper_bound": self.recipe.train.early_stopping is not None,
            },
            "probe": self.probe and {**asdict(self.probe), "tokens_per_second": self.probe.tokens_per_second},
            "data": {
                "num_examples": self.data.num_examples,
                "num_tokens": num_tokens,
                "num_supervised_tokens": round(scale * sum(num_supervised(example) for example in train)),
                "num_eval_examples": len(self.data.eval),
                "is_estimate": self.data.stream is not None,
                "sources": mixture(train, self.data.report, scale),
                **({"num_classes": len(self.classes.names)} if self.classes else {}),
            },
            "choices": {
                name: {"value": choice.value, "reason": choice.reason} for name, choice in self.choices.items()
            },
            "warnings": list(self.warnings),
            "advice": [advice.as_record() for advice in self.advice],
            "num_processes": world.size(),
            "device": self.device
            and {
                "name": self.device.name,
                "memory_bytes": self.device.memory_bytes,
                "bf16_flops_per_second": self.device.bf16_flops_per_second,
                "source": self.device.source,
                "is_estimate": True,
            },
            "scaling": self.scaling and self.scaling.as_record(),
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
                "train": examples_fingerprint(self.data.train)
                if self.data.stream is None
                else self.data.stream.contents,
                "eval": examples_fingerprint(self.data.eval),
                **({"labels": list(self.classes.names)} if self.classes else {}),
                **({"start": adapter_fingerprint(self.start)} if self.start else {}),
                **({"forgetting": examples_fingerprint(self.forgetting)} if self.forgetting else {}),
            },
            adapter={"targets": self.targets_in_words, "trainable": self.parameters.trainable},
        )


def prepare(
    recipe: Recipe,
    progress: Progress,
    device: Device | None = None,
    *,
    cluster: Cluster | None = None,
    weights: bool = True,
) -> Preparation:
    """Find out everything that can be known before the weights load.

    Args:
        recipe: What to do.
        progress: Who is told how it goes.
        device: Plan for this device in place of this machine's own.
        cluster: Plan for several of that device.
        weights: Whether they will be loaded; where not, a GGUF file's header is enough.

    Raises:
        RecipeError: A setting does not fit the model, or the model's files are incomplete.
        DataError: The data cannot be trained on.
        MachineError: The run does not fit the machine, or the hub cannot be reached.
    """
    check_trackers(recipe)
    check_metric(recipe.evaluate.metric)
    check_output(output_dir(recipe))
    where = choose_device(recipe.train.device) if device is None else Choice("cuda", f"{device.name}, as published")
    check_quantised(recipe.model.quantization, where.value, device)
    check_optimizer(recipe, where.value, is_here=device is None)
    base = locate_model(recipe.model, progress, weights=weights)
    config = load_config(base, recipe.model)
    check_checkpoint(config, recipe.model.quantization, name=base.name, device=where.value)
    classifies = is_classification(recipe)
    if classifies and cluster is not None:
        refuse_classifier(recipe, "--devices")
    positions = class_positions(recipe, config) if classifies else positions_of(config)
    max_length = _max_length(recipe, positions)
    labelled = prepare_classes(recipe, base, config, int(max_length.value), progress) if classifies else None
    config, head = (labelled.config, labelled.classes.head) if labelled else (config, ())
    model = skeleton(config, trust_remote_code=recipe.model.trust_remote_code, classifier=classifies)
    targets = resolve_targets(model, recipe.lora.targets, recipe.lora.layers)
    check_files(base, model, head)
    tokenizer = labelled.tokenizer if labelled else load_tokenizer(base, recipe.model)
    new_tokens = add_new_tokens(tokenizer, recipe.lora.new_tokens)
    growing = growing_parameters(model, new_tokens)
    grow(model, new_tokens)
    parameters = count_parameters(model, targets, recipe.lora, head)
    check_trained(recipe, model, parameters)
    start = check_start(recipe, parameters, output_dir(recipe))
    streaming, data = (
        (Choice("false"), labelled.data) if labelled else _data(recipe, tokenizer, int(max_length.value), progress)
    )
    forgetting = _forgetting(recipe, tokenizer, int(max_length.value), progress)
    check_vocabulary([*data.train, *data.eval, *forgetting], model)
    check_occasions(recipe.train, data.num_examples)
    prompts = () if recipe.evaluate.metric == "none" else held_out_prompts(recipe, data, tokenizer)
    check_references(recipe.evaluate.metric, prompts)
    check_prompts(recipe, prompts, positions)
    dtype = _dtype(recipe, where.value, device)
    free_memory()  # a model that was just converted leaves free pages in the heap, which loading takes again
    resident = resident_bytes()  # before the probes
    text_config = model.config.get_text_config()
    estimate_at = partial(
        estimate,
        recipe,
        text_config,
        model,
        targets,
        parameters,
        data=data,
        prompts=prompts,
        longest_answer=longest_answer(prompts, tokenizer),
        device=device,
    )
    place = Place(
        device=where.value,
        dtype=dtype.value,
        compiled=False,
        **quantised_place(recipe.model.quantization, base.path, model, dtype.value),
        stored_bytes=bytes_to_convert(
            base.path,
            None if recipe.model.quantization in PACKED else dtype.value,
            stored=base.stored,
            num_parameters=parameters.total - parameters.trainable,
        )
        + growing * torch_dtype(dtype.value).itemsize,
        resident_bytes=resident,
        free_bytes=_free_bytes(where.value) if device is None else device.memory_bytes,
    )
    ranks = world.size() if cluster is None else cluster.size
    strategy, estimated = strategy_for(recipe.train.strategy, ranks, place, estimate_at)
    if strategy == "fsdp":
        check_sharded(recipe)
    memory = estimated.memory
    choices = {
        "train.device": where,
        "model.dtype": dtype,
        "data.max_length": max_length,
        "data.streaming": streaming,
        "train.compile": estimated.compiled,
        "train.recompute": Choice(str(memory.num_recomputed), _recompute_reason(recipe, memory)),
        "train.token_budget": Choice(str(memory.token_budget), _budget_reason(recipe, memory)),
        "train.strategy": strategy_choice(recipe.train.strategy, strategy, ranks),
        "train.output_dir": Choice(str(output_dir(recipe))),
    }
    effective = _resolved(recipe, choices)
    check_disk(effective, parameters, data.num_examples)
    presets = count_presets(model, recipe.lora, head)
    steps = num_steps(data.num_examples, recipe.train.batch_size, recipe.train.epochs)
    return Preparation(
        recipe=effective,
        choices={name: choice for name, choice in choices.items() if choice.reason},
        base=base,
        tokenizer=tokenizer,
        new_tokens=new_tokens,
        targets=targets,
        targets_in_words=trained_in_words(model, recipe.lora, parameters),
        parameters=parameters,
        presets=tuple(plan_preset(p, recipe, text_config, model, data, estimated) for p in presets),
        data=data,
        prompts=prompts,
        start=start,
        forgetting=forgetting,
        memory=memory,
        time=estimated.time,
        num_steps=steps,
        warnings=(
            *(labelled.notes if labelled else ()),
            *target_notes(model, recipe.lora.targets, recipe.lora.target_parameters),
            *variant_notes(effective),
            *rank_notes(effective.lora, parameters.matrices),
            *occasion_notes(recipe.train, data.num_examples),
            *(base_notes(start, (base.name, str(base.path))) if start else ()),
            *unseen_tokens(tokenizer, new_tokens, data.train),
            *data.report["notices"],
            *device_notes(device, dtype.value),
            *quantization_notes(recipe.model.quantization, dtype.value),
        ),
        advice=give_advice(
            replace(
                advice_facts(
                    *(effective, base, tokenizer, model, targets, data),
                    presets=presets,
                    trainable=parameters.trainable,
                    steps=steps,
                ),
                num_devices=1 if cluster is None else cluster.size,
            )
        ),
        device=device,
        classes=labelled.classes if labelled else None,
        scaling=None
        if cluster is None
        else scale(cluster, recipe, text_config, parameters, data=data, place=place, estimate_at=estimate_at),
    )


def _free_bytes(device: str) -> int | None:
    """Of the processes that share a machine's memory, the share of one; each has a GPU of its own."""
    return None if world.local_size() == 1 or device != "cpu" else free_bytes(device) // world.local_size()


def output_dir(recipe: Recipe) -> Path:
    """The run directory; `auto` is named after the model, as in the seed's script."""
    if recipe.train.output_dir != "auto":
        return Path(recipe.train.output_dir)
    name = recipe.model.name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return Path("__models") / f"{name}-lora-fine-tuned"


def _data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress
) -> tuple[Choice, PreparedData]:
    """Whether the data is streamed, and the data."""
    section, seed = recipe.data, recipe.train.seed
    wanted = section.streaming
    possible = recipe.train.engine == "fast" and can_stream(section)
    if wanted is True and not possible:
        raise RecipeError(
            "data.streaming is true, but the rows of data.train cannot be read one by one",
            fix="give .jsonl files or hub data sets without weights, or data.streaming=auto",
        )
    if possible and wanted is not False:
        tables = open_tables(section, progress)
        num_rows = sum(map(len, tables.values()))
        if wanted is True or num_rows >= MANY_ROWS:
            reason = f"{num_rows:,} rows, each verified before its step" if wanted == "auto" else ""
            data = stream_data(section, tables, tokenizer, max_length=max_length, seed=seed, progress=progress)
            return Choice("true", reason), data
    data = prepare_data(
        section, tokenizer, max_length=max_length, seed=seed, cache=cache_dir() / "examples", progress=progress
    )
    return Choice("false"), data


def held_out_prompts(recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, ...]:
    """The prompts of the held-out conversations that are answered."""
    section = recipe.evaluate
    return tuple(
        render_prompts(data.eval_conversations, tokenizer, thinking=recipe.data.thinking, limit=section.samples)
    )


def _forgetting(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress
) -> tuple[Example, ...]:
    """The examples of `evaluate.forgetting`, made as the training examples are; their format is their own."""
    if recipe.evaluate.forgetting == "none":
        return ()
    own = {"train": recipe.evaluate.forgetting, "eval": "none", "format": "auto", "columns": {}}
    section = recipe.data.model_copy(update=own)
    prepared = prepare_data(
        section,
        tokenizer,
        max_length=max_length,
        seed=recipe.train.seed,
        cache=cache_dir() / "examples",
        progress=progress,
    )
    return tuple(prepared.train)


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


def _budget_reason(recipe: Recipe, memory: MemoryPlan) -> str:
    if recipe.train.token_budget != "auto":
        return ""
    return f"tokens per micro-batch, {memory.activation_bytes / 2**20:,.0f} MiB of activations"


def _recompute_reason(recipe: Recipe, memory: MemoryPlan) -> str:
    if recipe.train.recompute != "auto" or not memory.num_recomputed:
        return ""
    return "layers that keep their input only, so that the micro-batch fits"


def _dtype(recipe: Recipe, where: str, device: Device | None) -> Choice:
    if recipe.model.dtype == "auto" and recipe.model.quantization == "fp8":
        return Choice("bfloat16", "fp8 is made from it")
    if device is not None and recipe.model.dtype == "auto":
        return Choice("bfloat16", f"{device.name} multiplies it fastest")
    return choose_dtype(recipe.model.dtype, where)


def _resolved(recipe: Recipe, choices: dict[str, Choice]) -> Recipe:
    """The recipe with every `auto` replaced by what it became."""
    values = recipe.model_dump()
    for name, choice in choices.items():
        section, _, field = name.partition(".")
        is_number = name in ("data.max_length", "train.token_budget", "train.recompute")
        values[section][field] = int(choice.value) if is_number else choice.value
        if name in ("train.compile", "data.streaming"):
            values[section][field] = choice.value == "true"
    return Recipe.parse(values)
