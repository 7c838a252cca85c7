"""Everything that can be known before the weights load: what will be trained, whether it fits, what is wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loratune.data.examples import Example
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.prompts import Prompt, longest_answer, render_prompts
from loratune.data.steps import num_steps
from loratune.data.stream import MANY_ROWS, can_stream, open_tables, stream_data
from loratune.evaluation.scoring import check_metric, check_references
from loratune.model.adapter.new_tokens import add_new_tokens, num_added_parameters, resize_embeddings, unseen_tokens
from loratune.model.adapter.start_from import base_notes
from loratune.model.adapter.targets import resolve_targets, target_notes
from loratune.model.adapter.variants import rank_notes, variant_notes
from loratune.model.device import Choice, choose_device, free_memory, torch_dtype
from loratune.model.gguf_import import cache_dir
from loratune.model.load import load_config, load_tokenizer, locate_model, positions_of
from loratune.model.quantization.checkpoint import check_checkpoint
from loratune.model.quantization.kinds import PACKED
from loratune.model.safetensors_headers import bytes_to_convert
from loratune.planning.advice import give_advice
from loratune.planning.advice_facts import advice_facts
from loratune.planning.auto import (
    _budget_reason,
    _dtype,
    _free_bytes,
    _max_length,
    _recompute_reason,
    _resolved,
    output_dir,
)
from loratune.planning.checks import (
    cadence_notes,
    check_cadence,
    check_disk,
    check_files,
    check_optimizer,
    check_output,
    check_prompts,
    check_sharded,
    check_start,
    check_trackers,
    check_trained,
    check_vocabulary,
)
from loratune.planning.cost import ExecutionSetup
from loratune.planning.estimate import estimate
from loratune.planning.hardware.cluster import Cluster
from loratune.planning.hardware.devices import Device, device_notes
from loratune.planning.memory.memory import resident_bytes
from loratune.planning.memory.quantized import check_device_can_quantize, quantization_notes, quantized_setup
from loratune.planning.parameters import count_parameters, skeleton, trained_in_words
from loratune.planning.preparation import Preparation
from loratune.planning.presets import count_presets, plan_preset
from loratune.planning.scaling import scale, strategy_choice, strategy_for
from loratune.recipe.recipe import Recipe
from loratune.recipe.tasks import is_classification, refuse_classifier
from loratune.run import processes
from loratune.run.errors import RecipeError
from loratune.run.progress import Progress
from loratune.workflows.tasks.classification.prepare import classifier_positions, prepare_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    check_device_can_quantize(recipe.model.quantization, where.value, device)
    check_optimizer(recipe, where.value, is_here=device is None)
    base = locate_model(recipe.model, progress, weights=weights)
    config = load_config(base, recipe.model)
    check_checkpoint(config, recipe.model.quantization, name=base.name, device=where.value)
    classifies = is_classification(recipe)
    if classifies and cluster is not None:
        refuse_classifier(recipe, "--devices")
    positions = classifier_positions(recipe, config) if classifies else positions_of(config)
    max_length = _max_length(recipe, positions)
    labelled = prepare_classifier(recipe, base, config, int(max_length.value), progress) if classifies else None
    config, head = (labelled.config, labelled.classes.head) if labelled else (config, ())
    model = skeleton(config, trust_remote_code=recipe.model.trust_remote_code, classifier=classifies)
    targets = resolve_targets(model, recipe.lora.targets, recipe.lora.layers)
    check_files(base, model, head)
    tokenizer = labelled.tokenizer if labelled else load_tokenizer(base, recipe.model)
    new_tokens = add_new_tokens(tokenizer, recipe.lora.new_tokens)
    growing = num_added_parameters(model, new_tokens)
    resize_embeddings(model, new_tokens)
    parameters = count_parameters(model, targets, recipe.lora, head)
    check_trained(recipe, model, parameters)
    start = check_start(recipe, parameters, output_dir(recipe))
    streaming, data = (
        (Choice("false"), labelled.data) if labelled else _data(recipe, tokenizer, int(max_length.value), progress)
    )
    forgetting = _forgetting(recipe, tokenizer, int(max_length.value), progress)
    check_vocabulary([*data.train, *data.eval, *forgetting], model)
    check_cadence(recipe.train, data.num_examples)
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
    place = ExecutionSetup(
        device=where.value,
        dtype=dtype.value,
        compiled=False,
        **quantized_setup(recipe.model.quantization, base.path, model, dtype.value),
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
    ranks = processes.size() if cluster is None else cluster.size
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
            *cadence_notes(recipe.train, data.num_examples),
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
