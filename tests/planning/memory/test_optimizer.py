"""The bytes of an optimizer's state against its formula by hand; `tests/invariants` compares real checkpoints."""

from __future__ import annotations

import pytest

from loratune.model.adapter.targets import Matrix
from loratune.planning.memory.optimizer import state_bytes
from loratune.recipe.recipe import LoraSection, Optimizer

MATRICES = [Matrix(name="a", d_in=1024, d_out=512), Matrix(name="b", d_in=512, d_out=512)]
A_AND_B = 4 * (1024 + 512) + 4 * (512 + 512)
TRAINED_IN_FULL = [(100, 50), (7,)]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("sgd", 0),
        ("adamw", 8 * (A_AND_B + 5007)),
        ("lion", 4 * (A_AND_B + 5007)),
        ("muon", 4 * (A_AND_B + 5007)),
        ("adafactor", 4 * (2 * 4 + 1024 + 512 + 2 * 4 + 512 + 512 + 100 + 50 + 7)),
        # From 4,096 numbers on a byte each, a float for every 256, and a table of 256 floats; below that float32.
        ("adamw_8bit", 2 * (4096 + 4 * (16 + 256) + 3 * 4 * 2048 + 5000 + 4 * (20 + 256) + 4 * 7)),
    ],
)
def test_the_state_is_its_formula(optimizer: Optimizer, expected: int) -> None:
    assert state_bytes(optimizer, MATRICES, LoraSection(r=4), TRAINED_IN_FULL) == expected
