"""A run that cannot fit is refused before anything is loaded, because of training and evaluation alike."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.planning.memory.inputs import LayerBytes
from loratune.planning.memory.memory import MemoryPlan, wants_rehearsal
from loratune.run.errors import MachineError
from tests.planning.memory import records

MIB = 2**20
LAYER = LayerBytes(saved_for_backward=10_000, input=1_000, forward=12_000, backward=10_000, cache=50, attention=0)


def plan(free: int, **changes: Any) -> MemoryPlan:
    """Plan a model with 10 MiB of weights, whose layers save 10 kB of each token."""
    sizes = {"layer": LAYER, "largest_step": 1_000, "token_budget": None}
    return records.plan(weights_bytes=10 * MIB, free_bytes=free, **{**sizes, **changes})


def test_a_small_machine_gets_smaller_micro_batches_then_recomputed_layers_then_a_refusal() -> None:
    large = plan(free=80_000 * MIB)
    assert large.num_recomputed == 0
    assert large.peak_bytes < 0.8 * 80_000 * MIB
    least = next(free for free in range(100 * MIB, 80_000 * MIB, 10 * MIB) if fits(free))
    tight = plan(free=least)
    assert tight.num_recomputed > 0
    assert tight.token_budget < large.token_budget
    with pytest.raises(MachineError, match=r"one example of 100 tokens needs") as error:
        plan(free=least - 10 * MIB)
    assert "data.max_length" in error.value.fix


def fits(free: int) -> bool:
    try:
        plan(free=free)
    except MachineError:
        return False
    return True


def test_a_held_out_example_that_cannot_be_evaluated_is_refused_too() -> None:
    free = 4_000 * MIB
    assert plan(free=free, held_out=7_000).evaluation_bytes >= 7_000 * 12_000
    with pytest.raises(MachineError, match="one held-out example of 900,000 tokens needs"):
        plan(free=free, held_out=900_000)


def test_a_plan_close_to_the_memory_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan(free=80_000 * MIB)
    free = 100 * memory.peak_bytes
    monkeypatch.setattr("loratune.planning.memory.memory.free_bytes", lambda _: free)
    assert not wants_rehearsal(memory, "cpu")
    assert wants_rehearsal(memory, "cuda")
    free = 0
    assert wants_rehearsal(plan(free=80_000 * MIB, held_out=2_000_000), "cpu")
