"""What training some parameters of a model on some data costs on a machine: bytes and operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune.data.batch import num_supervised
from loratune.data.prepare import PreparedData
from loratune.data.prompts import Prompt
from loratune.data.steps import count_occurrences, num_steps, padded_step_tokens, step_tokens
from loratune.model.device import torch_dtype
from loratune.planning.memory.adapter import (
    stack_bytes,
    stack_kept_bytes,
    variant_bytes,
    whole_bytes,
    whole_kept_bytes,
)
from loratune.planning.memory.encoder import encoder_layer_bytes
from loratune.planning.memory.memory import MemoryPlan, TokenSizes, layer_bytes, plan_memory
from loratune.planning.memory.optimizer import state_bytes
from loratune.planning.parameters import ParameterCount
from loratune.planning.speed import WorkAmounts, training_flops
from loratune.planning.task import planned_task
from loratune.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionSetup:
    """Where the work is done.

    Attributes:
        device: cpu, cuda or mps.
        dtype: Name of the type of the frozen weights.
        compiled: Whether the layers run compiled.
        stored_bytes: Of the weights' files where they must be converted to be loaded.
        resident_bytes: Of this process, with libraries and data.
        free_bytes: Of a device that is not here; None for what is free on this machine.
        weights_bytes: Of a quantised base; None where it is a number of `dtype` a parameter.
        unpacked_bytes: Of quantised weights while they are multiplied.
        quantization: The recipe's, or that of weights which come in 8 bits of bitsandbytes.
        shards: Ranks that the frozen base is sharded over; 1 where each holds all of it.
    """

    device: str
    dtype: str
    compiled: bool
    stored_bytes: int = 0
    resident_bytes: int = 0
    free_bytes: int | None = None
    weights_bytes: int | None = None
    unpacked_bytes: int = 0
    quantization: str = "none"
    shards: int = 1


def token_sizes(recipe: Recipe, data: PreparedData, prompts: Sequence[Prompt], *, padded: bool = False) -> TokenSizes:
    """The sizes of what a run puts through the model. Any example of streamed data may be as long as `data.max_length`.
    `padded`: whether a step's examples are padded to its longest, as those of encoders are."""
    lengths = [len(example.input_ids) for example in data.train]
    if data.stream is not None:
        lengths = [int(data.report["max_length"])] * recipe.train.batch_size
    tokens_of = padded_step_tokens if padded else step_tokens
    steps = tokens_of(lengths, batch_size=recipe.train.batch_size, seed=recipe.train.seed)
    return TokenSizes(
        longest=max(lengths),
        largest_step=int(steps.max()),
        num_sizes=len(set(steps.tolist())) if data.stream is None else data.num_examples,
        held_out=max((len(example.input_ids) for example in data.eval), default=0),
        prompt=max((len(prompt.input_ids) for prompt in prompts), default=0),
        num_prompts=len(prompts),
        max_new_tokens=recipe.evaluate.max_new_tokens if prompts else 0,
        padded=padded,
    )


def run_memory(
    recipe: Recipe, config: Any, parameters: ParameterCount, work: TokenSizes, place: ExecutionSetup
) -> MemoryPlan:
    """Bytes at the peak, the token budget, and the layers to recompute.

    Args:
        recipe: Its token budget and recomputed layers may be auto.
        config: The model's text configuration.
        parameters: What is trained.
        work: What is run through the model.
        place: Where.

    Raises:
        MachineError: Not even one example fits.
    """
    wanted, recompute = recipe.train.token_budget, recipe.train.recompute
    dtype_bytes = torch_dtype(place.dtype).itemsize
    matrices, stacks = parameters.matrices, parameters.stacks
    linear = matrices[: len(matrices) - len(stacks)]
    active = int(getattr(config, "num_experts_per_tok", None) or 1)
    shards = 1 if place.device == "cpu" else place.shards  # a CPU loads the whole base, before it is sharded
    whole_kept = whole_kept_bytes(parameters.whole, dtype_bytes) + stack_kept_bytes(stacks, dtype_bytes, active)
    of_layer = (
        partial(encoder_layer_bytes, longest=max(work.longest, work.held_out))
        if work.padded
        else partial(layer_bytes, compiled=place.compiled, keeps_inputs=place.quantization == "int8")
    )
    return plan_memory(
        total_parameters=parameters.trainable + resident_parameters(config, parameters, shards),
        trainable_parameters=parameters.trainable,
        optimizer_bytes=state_bytes(recipe.train.optimizer, matrices, recipe.lora, parameters.whole_shapes),
        stored_bytes=place.stored_bytes,
        layer=of_layer(config, dtype_bytes, linear, lora=recipe.lora, device=place.device, whole_kept=whole_kept),
        num_layers=config.num_hidden_layers,
        dtype_bytes=dtype_bytes,
        device=place.device,
        compiled=place.compiled,
        loss_chunk_bytes=_logits_rows(recipe, config, place) * _num_outputs(recipe, config) * 4,
        row_logits_bytes=_num_outputs(recipe, config) * 4,
        work=work,
        wanted_budget=None if wanted == "auto" else int(wanted),
        wanted_recomputed=0 if place.quantization == "int8" else None if recompute == "auto" else int(recompute),
        weights_bytes=place.weights_bytes,
        unpacked_bytes=place.unpacked_bytes,
        resident=place.resident_bytes,
        free=place.free_bytes,
        variant_bytes=variant_bytes(linear, recipe.lora, dtype_bytes)
        + whole_bytes(parameters.whole, dtype_bytes)
        + stack_bytes(stacks, dtype_bytes),
    )


def _num_outputs(recipe: Recipe, config: Any) -> int:
    """Of the head: the vocabulary, or the classes."""
    return planned_task(recipe).num_outputs(config)


def _logits_rows(recipe: Recipe, config: Any, place: ExecutionSetup) -> int:
    """That the loss computes at once."""
    return planned_task(recipe).logits_rows(recipe, config, place.device)


def resident_parameters(config: Any, parameters: ParameterCount, shards: int) -> int:
    """Frozen parameters that a rank holds at the peak, of a base that is sharded layer by layer.

    Its shard of the layers; embeddings and head, which stay whole; and two layers, the one that computes and the one that is
    gathered meanwhile (PyTorch's notes on FSDP, docs.pytorch.org/docs/stable/notes/fsdp.html; `torch.distributed.fsdp.fully_shard`,
    `reshard_after_forward`).
    """
    frozen = parameters.total - parameters.trainable
    if shards == 1:
        return frozen
    layer, outside = sharded_parameters(config, parameters)
    return min(frozen, -(-(frozen - outside) // shards) + outside + 2 * layer)


def sharded_parameters(config: Any, parameters: ParameterCount) -> tuple[int, int]:
    """Frozen parameters of one decoder layer, and of what lies outside of the layers."""
    outside = config.vocab_size * config.hidden_size * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    return (parameters.total - parameters.trainable - outside) // int(config.num_hidden_layers), outside


def work_amounts(
    recipe: Recipe,
    config: Any,
    memory: MemoryPlan,
    *,
    data: PreparedData,
    prompts: Sequence[Prompt],
    longest_answer: int,
    load_bytes: int,
) -> WorkAmounts:
    """What a run computes, in tokens.

    Args:
        recipe: Its cadence of evaluation counts.
        config: The model's text configuration.
        memory: Decides how many answers are a batch.
        data: Training and held-out examples.
        prompts: That are answered.
        longest_answer: Tokens of the longest reference: where the tuned model is taken to stop. The base is taken to go on
            to `evaluate.max_new_tokens`, as most do that were not trained for the task.
        load_bytes: Of the weights' files.
    """
    section, epochs = recipe.evaluate, recipe.train.epochs
    steps = num_steps(data.num_examples, recipe.train.batch_size, epochs)
    evaluations = count_occurrences(recipe.train.eval_every, steps=steps, epochs=epochs) + 1  # and the base's
    batches = -(-len(prompts) // num_answers(prompts, memory, section.max_new_tokens))
    return WorkAmounts(
        num_layers=config.num_hidden_layers,
        num_recomputed=memory.num_recomputed,
        tokens=epochs * data.scale * sum(len(example.input_ids) for example in data.train),
        supervised=epochs * data.scale * sum(num_supervised(example) for example in data.train),
        held_out_tokens=sum(len(example.input_ids) for example in data.eval),
        held_out_supervised=sum(num_supervised(example) for example in data.eval),
        evaluations=evaluations + (recipe.train.eval_every == "never"),  # then the tuned model's comes afterwards
        prompt_tokens=sum(len(prompt.input_ids) for prompt in prompts),
        decode_steps=batches * (section.max_new_tokens + min(longest_answer, section.max_new_tokens)),
        load_bytes=load_bytes,
    )


def num_answers(prompts: Sequence[Prompt], memory: MemoryPlan, max_new_tokens: int) -> int:
    """The prompts that are answered at once."""
    if not prompts:
        return 1
    longest = max(len(prompt.input_ids) for prompt in prompts) + max_new_tokens
    return max(1, min(len(prompts), memory.generation_tokens // longest))


def layer_parameters(config: Any, model: Any, parameters: ParameterCount) -> int:
    """Of one decoder layer without its adapter."""
    return (parameters.total - parameters.trainable - _embeddings(config, model)) // int(config.num_hidden_layers)


def run_flops(recipe: Recipe, config: Any, model: Any, parameters: ParameterCount, data: PreparedData) -> float:
    """Floating-point operations of all steps. `model` may be on the meta device; the others as in `run_memory`."""
    per_epoch = training_flops(
        matmul_parameters=parameters.total - parameters.trainable - _embeddings(config, model),
        head_parameters=head_parameters(model),
        trainable_parameters=parameters.in_adapter,
        num_tokens=sum(len(example.input_ids) for example in data.train),
        num_supervised=sum(num_supervised(example) for example in data.train),
        trained_head=sum(item.trainable for item in parameters.whole if item.is_head),
        trained_matrices=sum(item.trainable for item in parameters.whole if not (item.is_head or item.is_embedding)),
    )
    return recipe.train.epochs * data.scale * per_epoch


def head_parameters(model: Any) -> int:
    """Of the output head."""
    head = model.get_output_embeddings()
    return head.weight.numel() if head is not None else 0


def _embeddings(config: Any, model: Any) -> int:
    """Parameters of input and output embeddings; of a classifier, whose head is small, of the input's."""
    if model.get_output_embeddings() is None:
        return int(model.get_input_embeddings().weight.numel())
    return head_parameters(model) * (1 if getattr(config, "tie_word_embeddings", False) else 2)
