"""What training some parameters of a model on some data costs on a machine: bytes, tokens and operations.

    recipe, model, data ──> cost ──> memory.plan_memory   bytes at the peak
                             ├─────> WorkAmounts          tokens, which `speed.plan_time` turns into seconds
                             └─────> run_flops            floating-point operations

Called by `estimate` (which adds this machine's speed), `presets` and `scaling`. Knows the recipe and the shapes of the
model; measures nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from loratune.data.batch import num_supervised
from loratune.data.steps import count_occurrences, num_steps, padded_step_tokens, step_tokens
from loratune.model.device import torch_dtype
from loratune.planning.memory.adapter import (
    fully_trained_bytes,
    saved_fully_trained_bytes,
    saved_target_parameter_bytes,
    target_parameter_bytes,
    variant_bytes,
)
from loratune.planning.memory.decoder import decoder_layer_bytes
from loratune.planning.memory.encoder import encoder_layer_bytes
from loratune.planning.memory.inputs import ExecutionSetup, LayerBytes, MemorySettings, ModelSizes, TokenSizes
from loratune.planning.memory.memory import MemoryPlan, plan_memory
from loratune.planning.memory.optimizer import state_bytes
from loratune.planning.speed import WorkAmounts, training_flops
from loratune.planning.task import planned_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.prepared import PreparedData
    from loratune.data.prompts import Prompt
    from loratune.planning.parameters import ParameterCount
    from loratune.recipe.recipe import Recipe


def token_sizes(recipe: Recipe, data: PreparedData, prompts: Sequence[Prompt], *, padded: bool = False) -> TokenSizes:
    """Return the sizes of what a run puts through the model.

    Args:
        recipe: Its batch size and the longest answer count.
        data: Training and held-out examples. Streamed examples are taken to be as long as `data.max_length`.
        prompts: The prompts to be answered.
        padded: Whether a micro-batch's examples are padded to its longest, as encoders do.
    """
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
    """Return the bytes at the peak, the token budget, and the number of layers to recompute.

    Args:
        recipe: Its token budget and recomputed layers may be auto.
        config: The model's text configuration.
        parameters: What is trained.
        work: What is run through the model.
        place: The device, and how the base lies on it.

    Raises:
        MachineError: Not even one example fits.
    """
    wanted, recompute = recipe.train.token_budget, recipe.train.recompute
    num_recomputed = None if recompute == "auto" else int(recompute)
    if place.quantization == "int8":  # whose layers save their inputs where recomputing cannot free them
        num_recomputed = 0
    return plan_memory(
        _model_sizes(recipe, config, parameters, work, place),
        work,
        place,
        MemorySettings(token_budget=None if wanted == "auto" else int(wanted), num_recomputed=num_recomputed),
    )


def _model_sizes(
    recipe: Recipe, config: Any, parameters: ParameterCount, work: TokenSizes, place: ExecutionSetup
) -> ModelSizes:
    """Return what the model and its adapter cost, however many tokens they see; arguments as in `run_memory`."""
    dtype_bytes = torch_dtype(place.dtype).itemsize
    task = planned_task(recipe)
    shards = 1 if place.device == "cpu" else place.shards  # a CPU loads the whole base before it is sharded
    row_logits_bytes = task.num_outputs(config) * 4
    return ModelSizes(
        weights_bytes=resident_parameters(config, parameters, shards) * dtype_bytes
        if place.weights_bytes is None
        else place.weights_bytes,
        trainable_parameters=parameters.trainable,
        optimizer_bytes=state_bytes(recipe.train.optimizer, parameters.matrices, recipe.lora, parameters.whole_shapes),
        variant_bytes=variant_bytes(parameters.target_matrices, recipe.lora, dtype_bytes)
        + fully_trained_bytes(parameters.whole, dtype_bytes)
        + target_parameter_bytes(parameters.stacks, dtype_bytes),
        layer=_layer_bytes(recipe, config, parameters, work, place),
        num_layers=config.num_hidden_layers,
        dtype_bytes=dtype_bytes,
        loss_chunk_bytes=task.logits_rows(recipe, config, place.device) * row_logits_bytes,
        row_logits_bytes=row_logits_bytes,
    )


def _layer_bytes(
    recipe: Recipe, config: Any, parameters: ParameterCount, work: TokenSizes, place: ExecutionSetup
) -> LayerBytes:
    """Return what a token costs in one layer; arguments as in `run_memory`."""
    dtype_bytes = torch_dtype(place.dtype).itemsize
    active = int(getattr(config, "num_experts_per_tok", None) or 1)
    saved = saved_fully_trained_bytes(parameters.whole, dtype_bytes)
    saved += saved_target_parameter_bytes(parameters.stacks, dtype_bytes, active)
    of_layer = (
        partial(encoder_layer_bytes, longest=max(work.longest, work.held_out))
        if work.padded
        else partial(decoder_layer_bytes, compiled=place.compiled, keeps_inputs=place.quantization == "int8")
    )
    return of_layer(
        config,
        dtype_bytes,
        parameters.target_matrices,
        lora=recipe.lora,
        device=place.device,
        fully_trained_saved=saved,
    )


def resident_parameters(config: Any, parameters: ParameterCount, shards: int) -> int:
    """Return the frozen parameters that a rank holds at the peak, if the base is sharded layer by layer.

    Its shard of the layers; embeddings and head, which are not sharded; and two whole layers, the one that computes and
    the one that is gathered meanwhile (PyTorch's notes on FSDP, docs.pytorch.org/docs/stable/notes/fsdp.html;
    `torch.distributed.fsdp.fully_shard`, `reshard_after_forward`). No cluster has been measured.

    Args:
        config: The model's text configuration.
        parameters: Counts of the model and its adapter.
        shards: Ranks that the base is sharded over; 1 if each holds all of it.
    """
    frozen = parameters.total - parameters.trainable
    if shards == 1:
        return frozen
    layer, outside = sharded_parameters(config, parameters)
    return min(frozen, -(-(frozen - outside) // shards) + outside + 2 * layer)


def sharded_parameters(config: Any, parameters: ParameterCount) -> tuple[int, int]:
    """Return the frozen parameters of one decoder layer, and those outside of the layers (embeddings and head)."""
    in_layers = parameters.total - parameters.trainable - parameters.outside
    return in_layers // int(config.num_hidden_layers), parameters.outside


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
    """Return what a run computes, in tokens.

    Args:
        recipe: Its epochs and its cadence of evaluation count.
        config: The model's text configuration.
        memory: Decides how many answers are generated at a time.
        data: Training and held-out examples.
        prompts: The prompts to be answered.
        longest_answer: Tokens of the longest reference answer.
        load_bytes: Bytes of the weights' files.
    """
    section, epochs = recipe.evaluate, recipe.train.epochs
    steps = num_steps(data.num_examples, recipe.train.batch_size, epochs)
    evaluations = count_occurrences(recipe.train.eval_every, steps=steps, epochs=epochs) + 1  # and the base's
    evaluations += recipe.train.eval_every == "never"  # the fine-tuned model is evaluated after the last step anyway
    batches = -(-len(prompts) // num_answers(prompts, memory, section.max_new_tokens))
    # The fine-tuned model is taken to stop where the longest reference does. The base is taken to go on to the limit,
    # as most models do that were not trained for the task.
    answer_tokens = section.max_new_tokens + min(longest_answer, section.max_new_tokens)
    # Answers during training are taken to go on to the limit; those after the last step are the evaluation's.
    looks = max(0, count_occurrences(section.samples_every, steps=steps, epochs=epochs) - 1) if prompts else 0
    tokens = epochs * data.scale * sum(len(example.input_ids) for example in data.train) * (1 - data.shared_fraction)
    return WorkAmounts(
        num_layers=config.num_hidden_layers,
        num_recomputed=memory.num_recomputed,
        tokens=tokens,
        micro_batches=max(steps, tokens / memory.token_budget),
        supervised=epochs * data.scale * sum(num_supervised(example) for example in data.train),
        held_out_tokens=sum(len(example.input_ids) for example in data.eval),
        held_out_supervised=sum(num_supervised(example) for example in data.eval),
        evaluations=evaluations,
        prompt_tokens=sum(len(prompt.input_ids) for prompt in prompts),
        decode_steps=batches * answer_tokens + looks * section.max_new_tokens,
        load_bytes=load_bytes,
        **_reference_pass(recipe, data, epochs),
    )


def _reference_pass(recipe: Recipe, data: PreparedData, epochs: float) -> dict[str, float]:
    """Return the tokens of the passes that compute what preferences are compared with; nothing for other tasks."""
    passes = planned_task(recipe).untrained_passes(recipe, epochs)
    if not any(passes):
        return {}
    sides = tuple(zip(passes, (data.train, data.eval), strict=True))
    return {
        "reference_tokens": sum(times * sum(len(each.input_ids) for each in side) for times, side in sides),
        "reference_supervised": sum(times * sum(map(num_supervised, side)) for times, side in sides),
    }


def num_answers(prompts: Sequence[Prompt], memory: MemoryPlan, max_new_tokens: int) -> int:
    """Return how many prompts are answered at a time."""
    if not prompts:
        return 1
    longest = max(len(prompt.input_ids) for prompt in prompts) + max_new_tokens
    return max(1, min(len(prompts), memory.generation_tokens // longest))


def run_flops(recipe: Recipe, model: Any, parameters: ParameterCount, data: PreparedData) -> float:
    """Return the floating-point operations of all steps; `model` may be on the meta device."""
    per_epoch = training_flops(
        matmul_parameters=parameters.total - parameters.trainable - parameters.outside,
        head_parameters=head_parameters(model),
        trainable_parameters=parameters.in_adapter,
        num_tokens=(1 - data.shared_fraction) * sum(len(example.input_ids) for example in data.train),
        num_supervised=sum(num_supervised(example) for example in data.train),
        trained_head=sum(item.trainable for item in parameters.whole if item.is_head),
        trained_matrices=sum(item.trainable for item in parameters.whole if not (item.is_head or item.is_embedding)),
    )
    return recipe.train.epochs * data.scale * per_epoch


def head_parameters(model: Any) -> int:
    """Return the parameters of the output head; 0 for a classifier, whose head is small."""
    head = model.get_output_embeddings()
    return head.weight.numel() if head is not None else 0
