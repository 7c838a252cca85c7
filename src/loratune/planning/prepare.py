"""Find out everything that can be known before the weights load: what will be trained, whether it fits, what is wrong.

    prepare = resolve_model → resolve_adapter → read_data → estimate_run → plan_notes

Each part returns a small frozen record, checks what it can, and fails before the next one starts. The quickest checks
come first.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from loratune.data.prepare import prepare_data
from loratune.data.steps import num_steps
from loratune.evaluation.scoring import check_metric, check_references
from loratune.model.adapter.new_tokens import add_new_tokens, num_added_parameters, resize_embeddings, unseen_tokens
from loratune.model.adapter.start_from import base_notes
from loratune.model.adapter.targets import resolve_targets, target_notes, unreached_notes
from loratune.model.adapter.variants import rank_notes, variant_notes
from loratune.model.device import Choice, choose_device, free_memory, torch_dtype
from loratune.model.load import load_config, locate_model
from loratune.model.quantization.checkpoint import check_checkpoint
from loratune.model.quantization.kinds import PACKED
from loratune.model.safetensors_headers import bytes_to_convert, weight_notes
from loratune.planning.advice import give_advice
from loratune.planning.advice_facts import advice_facts
from loratune.planning.auto import (
    budget_reason,
    choose_base_dtype,
    choose_max_length,
    free_device_bytes,
    output_dir,
    recompute_reason,
    resolve_auto,
    with_epochs,
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
from loratune.planning.estimate import Estimate, estimate
from loratune.planning.hardware.devices import Device, device_notes
from loratune.planning.lock import examples_fingerprint
from loratune.planning.memory.inputs import ExecutionSetup
from loratune.planning.memory.memory import resident_bytes
from loratune.planning.memory.quantized import check_device_can_quantize, quantization_notes, quantized_setup
from loratune.planning.parameters import count_parameters, trained_in_words
from loratune.planning.parts import RunAdapter, RunModel, RunParts
from loratune.planning.preparation import Preparation, RunEstimate, RunNotes
from loratune.planning.presets import PresetCount, count_presets, plan_preset
from loratune.planning.scaling import scale, strategy_choice, strategy_for
from loratune.planning.shared_tokens import with_shared_prefixes
from loratune.planning.task import planned_task
from loratune.recipe.recipe import Recipe
from loratune.recipe.roles import trained_roles
from loratune.recipe.sections.evaluate import UNSCORED_ANSWERS
from loratune.recipe.tasks import require_processes
from loratune.run import processes
from loratune.run.cache_folder import cache_dir
from loratune.run.errors import DataError, RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratune.data.examples import Example
    from loratune.data.prepared import PreparedData
    from loratune.data.prompts import Prompt
    from loratune.planning.hardware.cluster import Cluster
    from loratune.run.progress import Progress


def prepare(
    recipe: Recipe,
    progress: Progress,
    device: Device | None = None,
    *,
    cluster: Cluster | None = None,
    weights: bool = True,
    like: Preparation | None = None,
    at_once: int = 1,
) -> Preparation:
    """Find out everything that can be known before the weights load.

    Args:
        recipe: What to do.
        progress: Shows how far preparation is.
        device: The device to plan for; None for this machine's own.
        cluster: Several of that device to plan for.
        weights: Whether the weights will be loaded later; if not, the header of a GGUF file is enough.
        like: A prepared run of the same model and data, whose tokenizer and examples are taken.
        at_once: How many such runs share this machine; each has a GPU of its own, or its share of the memory.

    Raises:
        RecipeError: A setting does not fit the model, or the model's files are incomplete.
        DataError: The data cannot be trained on.
        MachineError: The run does not fit the machine, or the Hub cannot be reached.
    """
    model = resolve_model(recipe, progress, device, cluster=cluster, weights=weights) if like is None else like.model
    adapter = resolve_adapter(recipe, model)
    if like is None:
        streaming, data = read_data(recipe, model, progress)
    else:
        streaming, data = Choice(str(like.recipe.data.streaming).lower()), like.data
        check_trackers(recipe)
        check_optimizer(recipe, model.device.value, is_here=True)
    recipe, length = with_epochs(recipe, data.num_examples)
    recipe, data, shared = with_shared_prefixes(recipe, data, model.device.value)
    check_cadence(recipe.train, data.num_examples)
    parts = RunParts(model=model, adapter=adapter, data=data)
    presets = count_presets(model.skeleton, recipe.lora, model.head)
    choices, costs = estimate_run(recipe, parts, presets, device, cluster, at_once)
    choices |= {"data.streaming": streaming, **shared, **planned_task(recipe).choices(recipe)}
    effective = resolve_auto(recipe, choices)
    check_disk(effective, adapter.parameters, data.num_examples)
    return Preparation(
        recipe=effective,
        choices={name: choice for name, choice in (choices | length).items() if choice.reason},
        model=model,
        adapter=adapter,
        data=data,
        estimate=costs,
        notes=plan_notes(effective, parts, costs, presets, num_devices=1 if cluster is None else cluster.size),
    )


def prepare_on_all_ranks(recipe: Recipe, progress: Progress) -> Preparation:
    """Run `prepare` on every rank. Rank 0 goes first: it decides what `auto` becomes, and fills the cache of examples.

    Raises:
        RunError: The ranks see different data.
        LoratuneError: As `prepare`.
    """
    if processes.size() == 1:
        return prepare(recipe, progress)
    if recipe.train.engine == "trl":
        raise RecipeError("train.engine is trl, which trains in one process here", fix="train.engine=fast")
    require_processes(recipe, "training in several processes")
    if processes.is_main():
        prepared = prepare(recipe, progress)
        processes.store_set("recipe", prepared.recipe.model_dump_json())
    else:
        prepared = prepare(Recipe.parse(json.loads(processes.store_wait("recipe"))), progress)
    seen = processes.gather([examples_fingerprint(examples) for examples in (prepared.data.train, prepared.data.eval)])
    if seen[processes.rank()] != seen[0]:
        raise RunError(
            f"process {processes.rank()} does not see the same examples as process 0",
            fix="put the same files at the same paths on all machines",
        )
    return prepared


def resolve_model(
    recipe: Recipe,
    progress: Progress,
    device: Device | None = None,
    *,
    cluster: Cluster | None = None,
    weights: bool = True,
) -> RunModel:
    """Find the base model and build it without weights; the arguments and errors are those of `prepare`."""
    check_trackers(recipe)
    check_metric(recipe.evaluate.metric)
    check_output(output_dir(recipe))
    where = choose_device(recipe.train.device) if device is None else Choice("cuda", f"{device.name}, as published")
    check_device_can_quantize(recipe.model.quantization, where.value, device)
    check_optimizer(recipe, where.value, is_here=device is None)
    base = locate_model(recipe.model, progress, weights=weights)
    config = load_config(base, recipe.model)
    check_checkpoint(config, recipe.model.quantization, name=base.name, device=where.value)
    if cluster is not None:
        require_processes(recipe, "--devices", "leave it out")
    task = planned_task(recipe)
    positions = task.positions(recipe, config)
    max_length = choose_max_length(recipe, positions)
    found = task.resolve_model(recipe, base, config, int(max_length.value), progress)
    skeleton = task.skeleton(found.config, trust_remote_code=recipe.model.trust_remote_code)
    resolve_targets(
        skeleton, recipe.lora.targets, recipe.lora.layers
    )  # a wrong target is cheaper to find than a wrong file
    check_files(base, skeleton, found.classes.head if found.classes else ())
    new_tokens = add_new_tokens(found.tokenizer, recipe.lora.new_tokens)
    added = num_added_parameters(skeleton, new_tokens)
    resize_embeddings(skeleton, new_tokens)
    return RunModel(
        base=base,
        skeleton=skeleton,
        tokenizer=found.tokenizer,
        new_tokens=new_tokens,
        classes=found.classes,
        positions=positions,
        max_length=max_length,
        device=where,
        data=found.data,
        notes=found.notes,
        num_added_parameters=added,
    )


def resolve_adapter(recipe: Recipe, model: RunModel) -> RunAdapter:
    """Find the modules that are adapted, and count what is trained.

    Raises:
        RecipeError: Ranks, variant, patterns or the adapter to start from do not fit the model.
    """
    targets = resolve_targets(model.skeleton, recipe.lora.targets, recipe.lora.layers)
    parameters = count_parameters(model.skeleton, targets, recipe.lora, model.head)
    check_trained(recipe, model.skeleton, parameters)
    return RunAdapter(
        targets=targets,
        targets_in_words=trained_in_words(model.skeleton, recipe.lora, parameters),
        parameters=parameters,
        start=check_start(recipe, parameters, output_dir(recipe)),
    )


def read_data(recipe: Recipe, model: RunModel, progress: Progress) -> tuple[Choice, PreparedData]:
    """Return whether rows are streamed, and the verified examples with the prompts to be answered.

    Raises:
        DataError: The data cannot be trained or evaluated on.
        RecipeError: The tokenizer is another model's.
    """
    task = planned_task(recipe)
    max_length = int(model.max_length.value)
    if model.data is not None:
        streaming, data = Choice("false"), model.data
    else:
        streaming, data = task.read_data(recipe, model.tokenizer, max_length, progress)
    forgetting = _read_forgetting(recipe, model, max_length, progress)
    check_vocabulary([*data.train, *data.eval, *forgetting], model.skeleton)
    if recipe.evaluate.metric == "none":
        prompts, notices = _unscored_prompts(recipe, model, data)
        data = replace(data, report={**data.report, "notices": [*data.report["notices"], *notices]})
    else:
        prompts = task.prompts(recipe, data, model.tokenizer)
        check_references(recipe.evaluate.metric, prompts)
        check_prompts(recipe, prompts, model.positions)
    return streaming, replace(data, prompts=prompts, forgetting=forgetting)


def _unscored_prompts(recipe: Recipe, model: RunModel, data: PreparedData) -> tuple[tuple[Prompt, ...], list[str]]:
    """Return the prompts that are answered to be looked at, and notices; a run does not fail for want of them."""
    if not recipe.evaluate.samples or "assistant" not in (trained_roles(recipe.data.train_on) or ("assistant",)):
        return (), []
    try:
        prompts = planned_task(recipe).prompts(recipe, data, model.tokenizer)
    except DataError as error:
        return (), [f"No held-out prompt will be answered: {error.problem}."]
    room = None if model.positions is None else model.positions - recipe.evaluate.max_new_tokens
    fitting = tuple(prompt for prompt in prompts if room is None or len(prompt.input_ids) <= room)
    notices = []
    if prompts and not fitting:
        notices.append(
            "No held-out prompt will be answered: none leaves room for evaluate.max_new_tokens="
            f"{recipe.evaluate.max_new_tokens} in the model's {model.positions:,} positions."
        )
    return fitting[:UNSCORED_ANSWERS], notices


def _read_forgetting(recipe: Recipe, model: RunModel, max_length: int, progress: Progress) -> tuple[Example, ...]:
    """Return the examples of `evaluate.forgetting`, made as the training examples are; their format is their own."""
    if recipe.evaluate.forgetting == "none":
        return ()
    own = {"train": recipe.evaluate.forgetting, "eval": "none", "format": "auto", "columns": {}}
    prepared = prepare_data(
        recipe.data.model_copy(update=own),
        model.tokenizer,
        max_length=max_length,
        seed=recipe.train.seed,
        cache=cache_dir() / "examples",
        progress=progress,
    )
    return tuple(prepared.train)


def estimate_run(
    recipe: Recipe,
    parts: RunParts,
    presets: tuple[PresetCount, ...],
    device: Device | None,
    cluster: Cluster | None,
    at_once: int = 1,
) -> tuple[dict[str, Choice], RunEstimate]:
    """Return what every `auto` becomes, and the resulting memory and time; the arguments are those of `prepare`.

    Raises:
        MachineError: The run does not fit.
        RecipeError: A setting excludes what the memory needs.
    """
    model, adapter, data = parts.model, parts.adapter, parts.data
    where, dtype = model.device, choose_base_dtype(recipe, model.device.value, device)
    free_memory()  # a model that was just converted leaves free pages in the heap, which loading takes again
    place = _execution_setup(recipe, parts, dtype.value, device, at_once)
    estimate_at: Callable[..., Estimate] = partial(estimate, recipe, parts, device=device)
    ranks = processes.size() if cluster is None else cluster.size
    strategy, estimated = strategy_for(recipe.train.strategy, ranks, place, estimate_at)
    if strategy == "fsdp":
        check_sharded(recipe)
    memory = estimated.memory
    choices = {
        "train.device": where,
        "model.dtype": dtype,
        "data.max_length": model.max_length,
        "train.compile": estimated.compiled,
        "train.recompute": Choice(str(memory.num_recomputed), recompute_reason(recipe, memory)),
        "train.token_budget": Choice(str(memory.token_budget), budget_reason(recipe, memory)),
        "train.strategy": strategy_choice(recipe.train.strategy, strategy, ranks),
        "train.output_dir": Choice(str(output_dir(recipe))),
    }
    config: Any = model.text_config
    return choices, RunEstimate(
        memory=memory,
        time=estimated.time,
        num_steps=num_steps(data.num_examples, recipe.train.batch_size, recipe.train.epochs),
        presets=tuple(plan_preset(p, recipe, config, model.skeleton, data, estimated) for p in presets),
        device=device,
        scaling=None
        if cluster is None
        else scale(cluster, recipe, config, adapter.parameters, data=data, place=place, estimate_at=estimate_at),
    )


def _execution_setup(
    recipe: Recipe, parts: RunParts, dtype: str, device: Device | None, at_once: int
) -> ExecutionSetup:
    """Return where the run would compute, not yet compiled and holding the whole base."""
    model, parameters = parts.model, parts.adapter.parameters
    converted = bytes_to_convert(
        model.base.path,
        None if recipe.model.quantization in PACKED else dtype,
        stored=model.base.stored,
        num_parameters=parameters.total - parameters.trainable,
    )
    return ExecutionSetup(
        device=model.device.value,
        dtype=dtype,
        compiled=False,
        **quantized_setup(recipe.model.quantization, model.base.path, model.skeleton, dtype),
        stored_bytes=converted + model.num_added_parameters * torch_dtype(dtype).itemsize,
        resident_bytes=resident_bytes(),  # before the timing of layers, which leaves memory behind
        free_bytes=free_device_bytes(model.device.value, at_once) if device is None else device.memory_bytes,
    )


def _trained_names(adapter: RunAdapter) -> tuple[str, ...]:
    """Return the names of everything that is adapted, or trained in full."""
    stacks = (item.name for item in adapter.parameters.stacks)
    return (*adapter.targets, *stacks, *(item.name for item in adapter.parameters.whole))


def plan_notes(
    recipe: Recipe, parts: RunParts, costs: RunEstimate, presets: tuple[PresetCount, ...], *, num_devices: int
) -> RunNotes:
    """Return what the user should read before starting. `recipe` has every `auto` resolved."""
    model, adapter, data = parts.model, parts.adapter, parts.data
    base, lora = model.base, recipe.lora
    facts = advice_facts(recipe, parts, presets, num_steps=costs.num_steps)
    return RunNotes(
        warnings=(
            *model.notes,
            *weight_notes(base.path),
            *target_notes(model.skeleton, lora.targets, lora.target_parameters),
            *unreached_notes(model.skeleton, _trained_names(adapter)),
            *variant_notes(recipe),
            *rank_notes(lora, adapter.parameters.matrices),
            *cadence_notes(recipe.train, data.num_examples),
            *(base_notes(adapter.start, (base.name, str(base.path))) if adapter.start else ()),
            *unseen_tokens(model.tokenizer, model.new_tokens, data.train),
            *data.report["notices"],
            *device_notes(costs.device, recipe.model.dtype),
            *quantization_notes(recipe.model.quantization, recipe.model.dtype),
        ),
        advice=give_advice(replace(facts, num_devices=num_devices)),
    )
