"""Memory and time of a run, and whether it compiles: the formulas of `cost`, fed with what this machine was measured
to do.

`prepare` asks once for each way of spreading a run over devices (see `scaling.strategy_for`); `presets` scales the
answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from loratune.data.prompts import longest_answer
from loratune.model.device import Choice, choose_compile, compile_seconds, torch_dtype
from loratune.model.quantization.quantize import uncompiled
from loratune.planning.cost import (
    head_parameters,
    num_answers,
    run_flops,
    run_memory,
    sharded_parameters,
    token_sizes,
    work_amounts,
)
from loratune.planning.hardware.measured import gpu_rates
from loratune.planning.probe import probe
from loratune.planning.speed import LayerTimings, TimePlan, matmul_rate, plan_time, rates_by_arithmetic
from loratune.planning.task import StepCosts, planned_task
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from loratune.planning.hardware.devices import Device
    from loratune.planning.memory.inputs import ExecutionSetup, TokenSizes
    from loratune.planning.memory.memory import MemoryPlan
    from loratune.planning.parts import RunParts
    from loratune.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run costs.

    Attributes:
        memory: Bytes by component.
        time: Seconds.
        compiled: `true` or `false`, and why.
        work: The sizes that the memory was computed for.
        place: The device, and what it holds.
    """

    memory: MemoryPlan
    time: TimePlan
    compiled: Choice
    work: TokenSizes
    place: ExecutionSetup


def estimate(recipe: Recipe, parts: RunParts, *, place: ExecutionSetup, device: Device | None) -> Estimate:
    """Estimate memory and time, and decide whether to compile.

    Args:
        recipe: Its token budget, recomputed layers and compilation may be auto.
        parts: Model, adapter and data.
        place: The device and what it holds, not compiled yet.
        device: The named device to plan for; None for this machine.

    Raises:
        RecipeError: Compilation is asked for, and the base is quantized or sharded.
        MachineError: Not even one example fits, or compilation is asked for and impossible.
    """
    model, data, parameters = parts.model, parts.data, parts.adapter.parameters
    config = model.text_config
    costs = planned_task(recipe).step_costs(model.skeleton)
    reason = _why_uncompiled(recipe, config, costs, place)
    wanted = recipe.train.compile if recipe.train.engine == "fast" and not reason else False
    work = token_sizes(recipe, data, data.prompts, padded=costs.is_padded)
    place = replace(place, compiled=wanted is True)
    memory = run_memory(recipe, config, parameters, work, place)
    rate, timings, source = _timings(recipe, parts, costs, memory, place=place, device=device)
    flops = run_flops(recipe, model.skeleton, parameters, data)

    def clock(memory: MemoryPlan, *, compiled: bool) -> TimePlan:
        return plan_time(
            work_amounts(
                recipe,
                config,
                memory,
                data=data,
                prompts=data.prompts,
                longest_answer=longest_answer(data.prompts, model.tokenizer),
                load_bytes=place.stored_bytes or memory.weights_bytes,
            ),
            timings,
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


def _why_uncompiled(recipe: Recipe, config: Any, costs: StepCosts, place: ExecutionSetup) -> str:
    """Return why the layers cannot be compiled; empty if they can.

    Raises:
        RecipeError: Compilation, or recomputed layers, are asked for all the same.
    """
    reason = uncompiled(recipe.model.quantization, config)
    if recipe.lora.target_parameters:
        reason = "PEFT changes the parameters of lora.target_parameters while a layer runs"
    if place.shards > 1:
        reason = "the layers of a base that processes share (fsdp) run uncompiled"
    reason = costs.why_uncompiled or reason
    if reason and recipe.train.compile is True:
        raise RecipeError(f"train.compile is true, but {reason}", fix="train.compile=auto")
    if place.quantization == "int8" and recipe.train.recompute not in ("auto", 0):
        raise RecipeError(
            f"train.recompute is {recipe.train.recompute}, but the weights of {recipe.model.name} are in 8 bits by "
            "bitsandbytes, whose layers keep their inputs where recomputing cannot free them",
            fix="train.recompute=auto",
        )
    return reason


def _timings(
    recipe: Recipe,
    parts: RunParts,
    costs: StepCosts,
    memory: MemoryPlan,
    *,
    place: ExecutionSetup,
    device: Device | None,
) -> tuple[float, LayerTimings, str]:
    """Return operations per second of a matrix product, seconds of a layer and the head, and where these come from."""
    model, data, parameters = parts.model, parts.data, parts.adapter.parameters
    config = model.text_config
    (in_a_layer, _), in_the_head = sharded_parameters(config, parameters), head_parameters(model.skeleton)
    answers = num_answers(data.prompts, memory, recipe.evaluate.max_new_tokens if data.prompts else 0)
    measured, gpu = None, None
    if device is not None:
        rate = device.bf16_flops_per_second
        gpu, source = gpu_rates(device)
    else:
        dtype = torch_dtype(place.dtype)
        rate = matmul_rate(device=place.device, dtype=dtype, width=int(config.hidden_size))
        source = "a matrix product, run here"
        if costs.can_time_layers:
            measured = probe(
                config,
                recipe.lora,
                parts.adapter.targets,
                layer_parameters=in_a_layer,
                dtype=dtype,
                device=place.device,
                length=round(fmean(len(example.input_ids) for example in data.train)),
                num_answers=answers,
            )
    if measured is not None:
        source = "two layers of this shape, run here"
    timings = measured or rates_by_arithmetic(
        in_a_layer,
        in_the_head,
        answers,
        rate,
        gpu=gpu,
        weight_bytes=torch_dtype(place.dtype).itemsize,
        layer_outputs=_layer_outputs(config),
    )
    if not costs.times_head:  # a head of a few classes takes nothing next to the layers
        timings = replace(timings, head_train=0.0, head_forward=0.0, head_decode=0.0)
    return rate, timings, source


def _layer_outputs(config: Any) -> int:
    """Return the outputs of a layer's matrices for one token, on average where layers differ; 0 if unknown."""
    hidden, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 0)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 0)
    if not (isinstance(inner, int) and hidden and heads and inner):
        return 0
    width = getattr(config, "head_dim", None) or hidden // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return int((heads + 2 * shared) * width + 2 * hidden + 2 * inner * experts)
