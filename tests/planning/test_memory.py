"""What cannot fit is refused before anything is loaded, training and evaluation alike."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.errors import MachineError
from loratune.planning.memory import LayerBytes, MemoryPlan, plan_memory, wants_rehearsal

MIB = 2**20


def plan(free: int, **changed: Any) -> MemoryPlan:
    """Of a model with 10 MiB of weights, whose layers keep 10 kB of each token."""
    given: dict[str, Any] = {
        "total_parameters": 5 * MIB,
        "trainable_parameters": 0,
        "layer": LayerBytes(kept=10_000, input=1_000),
        "num_layers": 10,
        "dtype_bytes": 2,
        "device": "cpu",
        "loss_chunk_bytes": 0,
        "longest": 100,
        "longest_held_out": 0,
        "largest_step": 1_000,
        "wanted_budget": None,
        "wanted_recomputed": None,
    }
    return plan_memory(**{**given, "free": free, **changed})


def test_a_small_machine_gets_smaller_micro_batches_then_recomputed_layers_then_a_refusal() -> None:
    large = plan(free=8_000 * MIB)
    assert (large.token_budget, large.num_recomputed) == (2048, 0)
    assert large.peak_bytes < 0.8 * 8_000 * MIB
    fixed = 910 * MIB
    tight = plan(free=int((fixed + 20 * MIB) / 0.8))
    assert tight.num_recomputed > 0
    assert tight.peak_bytes <= fixed + 20 * MIB
    with pytest.raises(MachineError, match=r"one example of 100 tokens needs 0\.9 GiB, 0\.9 GiB are free") as error:
        plan(free=fixed)
    assert "data.max_length" in error.value.fix


def test_a_held_out_example_that_cannot_be_evaluated_is_refused_too() -> None:
    free = int(1_000 * MIB / 0.8)
    small = {"largest_step": 500, "wanted_budget": 500}
    assert plan(free=free, **small).activation_bytes == 500 * 110_000
    assert plan(free=free, **small, longest_held_out=7_000).activation_bytes == 7_000 * 12_000
    with pytest.raises(MachineError, match="one held-out example of 9,000 tokens needs"):
        plan(free=free, **small, longest_held_out=9_000)


def test_a_plan_close_to_the_memory_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan(free=8_000 * MIB)
    free = 100 * memory.peak_bytes
    monkeypatch.setattr("loratune.planning.memory.free_bytes", lambda _: free)
    assert not wants_rehearsal(memory, "cpu")
    assert wants_rehearsal(memory, "cuda")
    free = 0
    assert wants_rehearsal(plan(free=80_000 * MIB, longest_held_out=2_000_000), "cpu")
