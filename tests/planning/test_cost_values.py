"""Memory and operations of a run on a small Llama, counted from its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loratune.model.adapter.targets import resolve_targets
from loratune.model.kernels.cross_entropy import chunk_rows
from loratune.planning.cost import (
    resident_parameters,
    run_flops,
    run_memory,
    sharded_parameters,
    token_sizes,
)
from loratune.planning.memory.adapter import fully_trained_bytes, variant_bytes
from loratune.planning.memory.inputs import ExecutionSetup, TokenSizes
from loratune.planning.memory.memory import MemoryPlan
from loratune.planning.parameters import ParameterCount, count_parameters
from loratune.recipe.recipe import Recipe
from tests.planning.test_cost import DATA, PROMPTS, recipe

LAYERS, HIDDEN, VOCABULARY = 4, 64, 256
PLACE = ExecutionSetup(device="cuda", dtype="bfloat16", compiled=False, free_bytes=10**12)


class Rows:
    """A stream of so many rows."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.contents: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes))
        model.tie_weights()
    return model


def with_lora(**lora: Any) -> Recipe:
    made = recipe()
    return made.model_copy(update={"lora": made.lora.model_copy(update=lora)})


def counted(model: LlamaForCausalLM, made: Recipe, head: Sequence[str] = ()) -> ParameterCount:
    return count_parameters(model, resolve_targets(model, made.lora.targets), made.lora, head)


def memory(made: Recipe, model: LlamaForCausalLM, work: TokenSizes | None = None, **place: Any) -> MemoryPlan:
    work = work or token_sizes(made, DATA, PROMPTS)
    return run_memory(made, model.config, counted(model, made), work, replace(PLACE, **place))


@pytest.mark.parametrize("tied", [True, False])
def test_layers_are_what_embeddings_and_head_leave(tied: bool) -> None:
    model = llama(tied=tied)
    parameters = counted(model, recipe())
    table = VOCABULARY * HIDDEN
    layer, outside = sharded_parameters(model.config, parameters)
    assert outside == table * (1 if tied else 2)
    in_layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert layer == in_layer + HIDDEN // LAYERS, "the last norm is counted with the layers"
    assert parameters.outside == outside


@pytest.mark.parametrize(("shards", "part"), [(2, 2), (3, 3)])
def test_a_rank_holds_its_shard_two_layers_and_what_is_outside(shards: int, part: int) -> None:
    model = llama()
    parameters = counted(model, recipe())
    frozen = sum(weight.numel() for weight in model.parameters())
    layer, outside = sharded_parameters(model.config, parameters)
    assert resident_parameters(model.config, parameters, 1) == frozen
    shard = (frozen - outside + part - 1) // part
    assert resident_parameters(model.config, parameters, shards) == min(frozen, shard + outside + 2 * layer)
    assert resident_parameters(model.config, parameters, 1000) < frozen


def test_sharding_frees_a_gpu_and_not_a_cpu_which_loads_all_of_it_first() -> None:
    model, made = llama(), recipe()
    frozen = sum(weight.numel() for weight in model.parameters())
    assert memory(made, model).weights_bytes == memory(made, model, device="cpu", shards=8).weights_bytes == 2 * frozen
    assert memory(made, model, shards=8).weights_bytes == 2 * resident_parameters(model.config, counted(model, made), 8)
    assert memory(made, model, weights_bytes=12345).weights_bytes == 12345, "a quantized base says its own bytes"


def test_the_recipe_decides_recomputation_except_for_int8() -> None:
    model = llama()
    assert memory(recipe(recompute=3), model).num_recomputed == 3
    assert memory(recipe(recompute="auto"), model).num_recomputed == 0
    assert memory(recipe(recompute=3), model, quantization="int8").num_recomputed == 0


def test_variant_and_modules_trained_in_full_add_their_bytes() -> None:
    made, model = with_lora(variant="dora", modules_to_save=("lm_head",)), llama()
    parameters = counted(model, made)
    assert fully_trained_bytes(parameters.whole, 2) == 4 * VOCABULARY * HIDDEN
    assert memory(made, model).variant_bytes == (
        variant_bytes(parameters.target_matrices, made.lora, 2) + 4 * VOCABULARY * HIDDEN
    )


def test_the_loss_takes_its_rows_of_the_vocabulary() -> None:
    chunk = 4 * VOCABULARY * chunk_rows(VOCABULARY, "cuda")
    assert memory(recipe(), llama()).loss_bytes == chunk * 2 + chunk // 2


def test_a_stream_is_planned_for_its_longest_possible_rows() -> None:
    streamed = replace(DATA, stream=Rows(1000), report={"max_length": 77})
    sizes = token_sizes(recipe(), streamed, ())
    assert (sizes.longest, sizes.largest_step, sizes.num_sizes) == (77, 4 * 77, 1000)
    assert token_sizes(recipe(), DATA, ()).num_sizes <= 3


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_of_layers_head_and_adapter(tied: bool) -> None:
    model, made = llama(tied=tied), recipe()
    parameters = counted(model, made)
    table = VOCABULARY * HIDDEN
    layers = sum(weight.numel() for weight in model.model.layers.parameters()) + HIDDEN  # and the last norm
    tokens, supervised = sum(20 + n for n in range(12)), 12 * 5
    expected = 4 * layers * tokens + 4 * table * supervised + 6 * parameters.trainable * tokens
    assert run_flops(made, model, parameters, DATA) == 2 * expected, "two epochs"
    assert run_flops(made, model, parameters, replace(DATA, stream=Rows(36))) == 2 * 3 * expected


def test_modules_trained_in_full_have_gradients_of_their_own() -> None:
    made, model = with_lora(modules_to_save=("lm_head", "norm", "embed_tokens")), llama()
    parameters = counted(model, made)
    tokens, supervised = sum(20 + n for n in range(12)), 12 * 5
    frozen = parameters.total - parameters.trainable - 2 * VOCABULARY * HIDDEN
    norms = sum(item.trainable for item in parameters.whole if not (item.is_head or item.is_embedding))
    assert norms >= HIDDEN
    expected = 4 * frozen * tokens + 4 * VOCABULARY * HIDDEN * supervised + 6 * parameters.in_adapter * tokens
    expected += 2 * VOCABULARY * HIDDEN * supervised + 2 * norms * tokens
    assert run_flops(made, model, parameters, DATA) == 2 * expected
