"""Bytes of adapters, variants and fully trained modules, worked out by hand."""

from __future__ import annotations

import pytest

from loratune.model.adapter.modules_to_save import FullyTrained
from loratune.model.adapter.targets import Matrix
from loratune.planning.memory.adapter import (
    fully_trained_bytes,
    saved_bytes,
    saved_fully_trained_bytes,
    saved_target_parameter_bytes,
    target_parameter_bytes,
    variant_bytes,
)
from loratune.planning.memory.optimizer import state_bytes
from loratune.recipe.recipe import LoraSection

MATRICES = [
    Matrix(name="l.self_attn.q_proj", d_in=64, d_out=32),
    Matrix(name="l.self_attn.v_proj", d_in=64, d_out=16),
    Matrix(name="l.mlp.down_proj", d_in=128, d_out=64),
]
STACKS = [Matrix(name="l.experts.up", d_in=8, d_out=4, count=3), Matrix(name="l.experts.down", d_in=4, d_out=8)]
HEAD = FullyTrained(name="head", shapes=((100, 8),), saved=(), is_head=True)
EMBEDDING = FullyTrained(name="embed", shapes=((100, 8),), saved=(), is_embedding=True)
NEW_ROWS = FullyTrained(name="embed", shapes=((2, 8),), saved=(), is_embedding=True, is_rows=True)
INSIDE = FullyTrained(name="l.mlp.up_proj", shapes=((128, 64), (128,)), saved=())
NORM = FullyTrained(name="norm", shapes=((64,),), saved=())


def test_query_and_value_save_their_common_input_once() -> None:
    lora = LoraSection(r=4, dropout=0)
    assert saved_bytes(MATRICES, lora, 2) == 2 * (64 + 128) + 2 * 3 * 4
    assert saved_bytes(MATRICES, lora, 2, inputs=False) == 2 * 3 * 4


def test_dropout_saves_a_byte_for_each_element_of_each_input() -> None:
    assert saved_bytes(MATRICES, LoraSection(r=4, dropout=0.1), 2, inputs=False) == 2 * 3 * 4 + (64 + 64 + 128)


@pytest.mark.parametrize(
    ("dropout", "dtype_bytes", "expected"),
    [
        (0.1, 2, 4 * (64 + 2 * 32 + 4) + 64),  # a byte of mask an element, its product, output and update
        (0.1, 4, 4 * (64 + 2 * 32 + 4) + 64),
        (0.0, 2, 4 * 64 + (4 + 2) * 32 + 4 * 4),  # a float32 copy of the input
        (0.0, 4, 4 * 64 + (4 + 4) * 32 + 4 * 4),  # the input itself
    ],
)
def test_dora_saves_outputs_and_products(dropout: float, dtype_bytes: int, expected: int) -> None:
    lora = LoraSection(r=4, dropout=dropout, variant="dora")
    assert saved_bytes(MATRICES[:1], lora, dtype_bytes) == expected


def test_dora_on_a_narrow_base_with_dropout_keeps_a_copy_of_each_matrix_and_builds_the_largest_update() -> None:
    copies = 4 * (64 * 32 + 64 * 16 + 128 * 64)
    largest = 4 * (128**2 + 4 * 128 * 64)
    assert variant_bytes(MATRICES, LoraSection(r=4, variant="dora", dropout=0.1), 2) == copies + largest
    assert variant_bytes(MATRICES, LoraSection(r=4, variant="dora", dropout=0.1), 4) == largest
    assert variant_bytes(MATRICES, LoraSection(r=4, variant="dora", dropout=0), 2) == largest


def test_stacks_are_copied_and_the_largest_has_its_gradient_twice() -> None:
    assert target_parameter_bytes(STACKS, 2) == 2 * (96 + 32) + 2 * 2 * 96
    assert target_parameter_bytes([], 2) == 0
    assert saved_target_parameter_bytes(STACKS, 2, active=2) == 2 * (2 * 8 + 1 * 4)


def test_a_head_takes_a_gradient_and_an_embedding_a_table_of_them() -> None:
    assert fully_trained_bytes([HEAD, INSIDE, NORM], 2) == 4 * 800
    assert fully_trained_bytes([EMBEDDING], 2) == (4 + 2) * 800
    assert fully_trained_bytes([HEAD, EMBEDDING], 2) == 4 * 800 + (4 + 2) * 800
    assert fully_trained_bytes([NEW_ROWS], 2) == 0, "rows of new tokens have a gradient of their own size"


def test_matrices_inside_the_layers_save_their_inputs() -> None:
    assert saved_fully_trained_bytes([HEAD, EMBEDDING, INSIDE, NORM], 2) == 2 * 64


@pytest.mark.parametrize(
    ("optimizer", "variant", "expected"),
    [
        ("sgd", "plain", 0),
        ("lion", "plain", 4 * (4 * (64 + 32) + 10 * 20)),
        ("muon", "plain", 4 * (4 * (64 + 32) + 10 * 20)),
        ("adamw", "plain", 8 * (4 * (64 + 32) + 10 * 20)),
        ("adamw", "dora", 8 * (4 * (64 + 32) + 32 + 10 * 20)),
        ("adamw_8bit", "plain", 2 * 4 * (4 * 64 + 4 * 32 + 200)),  # all too small for 8 bits
        ("adamw_8bit", "dora", 2 * 4 * (4 * 64 + 4 * 32 + 32 + 200)),
        ("adafactor", "plain", 4 * (2 * 4 + 64 + 32 + 10 + 20)),
        ("adafactor", "dora", 4 * (2 * 4 + 64 + 32 + 32 + 10 + 20)),
    ],
)
def test_what_an_optimizer_keeps_of_a_matrix_and_a_module(optimizer: str, variant: str, expected: int) -> None:
    lora = LoraSection(r=4, variant=variant)
    assert state_bytes(optimizer, MATRICES[:1], lora, [(10, 20)]) == expected  # type: ignore[arg-type]


def test_a_stack_counts_each_of_its_matrices() -> None:
    stack = [Matrix(name="l.experts.up", d_in=1024, d_out=512, count=3)]
    a, b = 4 * 3 * 1024, 4 * 3 * 512
    in_8_bits = sum(size + 4 * (-(-size // 256) + 256) for size in (a, b))
    assert state_bytes("adamw_8bit", stack, LoraSection(r=4)) == 2 * in_8_bits
    assert state_bytes("adafactor", stack, LoraSection(r=4)) == 4 * (2 * 4 * 3 + 1024 + 512)


def test_eight_bits_begin_at_4096_numbers() -> None:
    small, large = ([Matrix(name="m", d_in=side, d_out=1)] for side in (1023, 1024))
    assert state_bytes("adamw_8bit", small, LoraSection(r=4)) == 2 * 4 * (4 * 1023 + 4)
    assert state_bytes("adamw_8bit", large, LoraSection(r=4)) == 2 * (4096 + 4 * (16 + 256) + 4 * 4)
