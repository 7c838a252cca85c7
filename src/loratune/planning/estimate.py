"""Memory and seconds of a run, and whether it compiles: the formulas, fed with what this machine was measured to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from loratune.data.prepare import PreparedData
from loratune.data.prompts import Prompt
from loratune.model.classifier import is_decoder
from loratune.model.device import Choice, choose_compile, compile_seconds, torch_dtype
from loratune.model.quantization.quantize import uncompiled
from loratune.planning.cost import (
    ExecutionSetup,
    head_parameters,
    layer_parameters,
    num_answers,
    run_flops,
    run_memory,
    token_sizes,
    work_amounts,
)
from loratune.planning.hardware.devices import Device
from loratune.planning.memory.memory import MemoryPlan, TokenSizes
from loratune.planning.parameters import ParameterCount
from loratune.planning.probe import probe
from loratune.planning.speed import LayerTimings, TimePlan, WorkAmounts, matmul_rate, plan_time, rates_by_arithmetic
from loratune.recipe.recipe import Recipe
from loratune.recipe.tasks import is_classification
from loratune.run.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run costs.

    Attributes:
        memory: Bytes by component.
        time: Seconds.
        compiled: `true` or `false`, and why.
        work: The sizes that the memory was computed for.
        place: Where.
    """

    memory: MemoryPlan
    time: TimePlan
    compiled: Choice
    work: TokenSizes
    place: ExecutionSetup


def estimate(
    recipe: Recipe,
    config: Any,
    model: Any,
    targets: tuple[str, ...],
    parameters: ParameterCount,
    *,
    data: PreparedData,
    prompts: Sequence[Prompt],
    longest_answer: int,
    place: ExecutionSetup,
    device: Device | None,
) -> Estimate:
    """Memory, time, and whether to compile.

    Args:
        recipe: Its token budget, recomputed layers and compilation may be auto.
        config: The model's text configuration.
        model: On the meta device.
        targets: Full names of the adapted modules.
        parameters: What is trained.
        data: Training and held-out examples.
        prompts: That are answered.
        longest_answer: Tokens of the longest reference answer.
        place: Where; not compiled yet.
        device: A device that is not here; None for this machine.

    Raises:
        RecipeError: Compilation is asked for, and the base is quantised or sharded.
        MachineError: Not even one example fits, or compilation is asked for and impossible.
    """
    reason = uncompiled(recipe.model.quantization, config)
    if recipe.lora.target_parameters:
        reason = "PEFT changes the parameters of lora.target_parameters while a layer runs"
    if place.shards > 1:
        reason = "the layers of a base that processes share (fsdp) run uncompiled"
    if is_classification(recipe):
        reason = "the layers of a classifier run uncompiled"
    if reason and recipe.train.compile is True:
        raise RecipeError(f"train.compile is true, but {reason}", fix="train.compile=auto")
    if place.quantization == "int8" and recipe.train.recompute not in ("auto", 0):
        raise RecipeError(
            f"train.recompute is {recipe.train.recompute}, but the weights of {recipe.model.name} come in 8 bits of bitsandbytes, whose "
            "layers keep their inputs where recomputing cannot free them",
            fix="train.recompute=auto",
        )
    wanted = recipe.train.compile if recipe.train.engine == "fast" and not reason else False
    classifies = is_classification(recipe)
    work = token_sizes(recipe, data, prompts, padded=classifies and not is_decoder(model))
    place = replace(place, compiled=wanted is True)
    memory = run_memory(recipe, config, parameters, work, place)
    in_a_layer, answers = layer_parameters(config, model, parameters), num_answers(prompts, memory, work.max_new_tokens)
    rate, rates, source = _rates(
        recipe,
        config,
        targets,
        can_probe=not classifies or is_decoder(model),
        in_a_layer=in_a_layer,
        in_the_head=head_parameters(model),
        length=round(fmean(len(example.input_ids) for example in data.train)),
        answers=answers,
        place=place,
        device=device,
    )
    if classifies:  # a head of some classes takes nothing beside the layers
        rates = replace(rates, head_train=0.0, head_forward=0.0, head_decode=0.0)
    flops = run_flops(recipe, config, model, parameters, data)

    def clock(memory: MemoryPlan, *, compiled: bool) -> TimePlan:
        amounts: WorkAmounts = work_amounts(
            recipe,
            config,
            memory,
            data=data,
            prompts=prompts,
            longest_answer=longest_answer,
            load_bytes=place.stored_bytes or memory.weights_bytes,
        )
        return plan_time(
            amounts,
            rates,
            compile_seconds=compile_seconds() if compiled else None,
            flops=flops,
            flops_per_second=rate,
            source=source,
        )

    compiled = choose_compile(wanted, device=place.device, train_seconds=clock(memory, compiled=False).train_seconds)
    if reason:
        compiled = Choice("false", reason)
    place = replace(place, compiled=compiled.value == "true")
    memory = run_memory(recipe, config, parameters, work, place)
    return Estimate(
        memory=memory, time=clock(memory, compiled=place.compiled), compiled=compiled, work=work, place=place
    )


def _rates(
    recipe: Recipe,
    config: Any,
    targets: tuple[str, ...],
    *,
    can_probe: bool,
    in_a_layer: int,
    in_the_head: int,
    length: int,
    answers: int,
    place: ExecutionSetup,
    device: Device | None,
) -> tuple[float, LayerTimings, str]:
    """Operations per second of a matrix product, seconds of a layer and the head, and where these come from."""
    if device is not None:
        rate = device.bf16_flops_per_second
        return rate, rates_by_arithmetic(in_a_layer, in_the_head, answers, rate), f"the published peak of {device.name}"
    dtype = torch_dtype(place.dtype)
    rate = matmul_rate(device=place.device, dtype=dtype, width=int(config.hidden_size))
    measured = None
    if can_probe:
        measured = probe(
            config,
            recipe.lora,
            targets,
            layer_parameters=in_a_layer,
            dtype=dtype,
            device=place.device,
            length=length,
            num_answers=answers,
        )
    if measured is not None:
        return rate, measured, "two layers of this shape, run here"
    return rate, rates_by_arithmetic(in_a_layer, in_the_head, answers, rate), "a matrix product, run here"
