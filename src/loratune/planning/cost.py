"""What training some parameters of a model on some data costs on a machine: bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratune.data.batch import num_supervised
from loratune.data.prepare import PreparedData
from loratune.data.steps import largest_step
from loratune.kernels.cross_entropy import chunk_rows
from loratune.model.device import torch_dtype
from loratune.planning.memory import MemoryPlan, layer_bytes, plan_memory
from loratune.planning.parameters import ParameterCount
from loratune.planning.speed import training_flops
from loratune.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the work is done.

    Attributes:
        device: cpu, cuda or mps.
        dtype: Name of the type of the frozen weights.
        compiled: Whether the layers run compiled.
        free_bytes: Of a device that is not here; None for what is free on this machine.
    """

    device: str
    dtype: str
    compiled: bool
    free_bytes: int | None = None


def run_memory(recipe: Recipe, config: Any, parameters: ParameterCount, data: PreparedData, place: Place) -> MemoryPlan:
    """Bytes at the peak, the token budget, and the layers to recompute.

    Args:
        recipe: Its token budget and recomputed layers may be auto.
        config: The model's text configuration.
        parameters: What is trained.
        data: Its training examples; of streamed data, any example may be as long as `data.max_length`.
        place: Where.

    Raises:
        MachineError: Not even one example fits.
    """
    wanted, recompute = recipe.train.token_budget, recipe.train.recompute
    dtype_bytes = torch_dtype(place.dtype).itemsize
    lengths = [len(example.input_ids) for example in data.train]
    if data.stream is not None:
        lengths = [int(data.report["max_length"])] * recipe.train.batch_size
    return plan_memory(
        total_parameters=parameters.total,
        trainable_parameters=parameters.trainable,
        layer=layer_bytes(
            config,
            dtype_bytes,
            [count.matrix for count in parameters.per_module],
            r=recipe.lora.r,
            dropout=recipe.lora.dropout,
            compiled=place.compiled,
        ),
        num_layers=config.num_hidden_layers,
        dtype_bytes=dtype_bytes,
        device=place.device,
        loss_chunk_bytes=chunk_rows(config.vocab_size, place.device) * config.vocab_size * 4,
        longest=max(lengths),
        longest_held_out=max((len(example.input_ids) for example in data.eval), default=0),
        largest_step=largest_step(lengths, batch_size=recipe.train.batch_size, seed=recipe.train.seed),
        wanted_budget=None if wanted == "auto" else int(wanted),
        wanted_recomputed=None if recompute == "auto" else int(recompute),
        free=place.free_bytes,
    )


def run_flops(recipe: Recipe, config: Any, model: Any, parameters: ParameterCount, data: PreparedData) -> float:
    """Floating-point operations of all steps. `model` may be on the meta device; the others as in `run_memory`."""
    head = model.get_output_embeddings()
    head_parameters = head.weight.numel() if head is not None else 0
    tied = bool(getattr(config, "tie_word_embeddings", False))
    embeddings = head_parameters if tied else 2 * head_parameters
    return (
        recipe.train.epochs
        * data.scale
        * training_flops(
            matmul_parameters=parameters.total - parameters.trainable - embeddings,
            head_parameters=head_parameters,
            trainable_parameters=parameters.trainable,
            num_tokens=sum(len(example.input_ids) for example in data.train),
            num_supervised=sum(num_supervised(example) for example in data.train),
        )
    )
