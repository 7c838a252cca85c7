"""What cannot fit is refused before anything is loaded, training and evaluation alike."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.planning.memory.memory import LayerBytes, MemoryPlan, TokenSizes, plan_memory, wants_rehearsal
from loratune.run.errors import MachineError

MIB = 2**20
WORK = TokenSizes(longest=100, largest_step=1_000, held_out=0, prompt=0, num_prompts=0, max_new_tokens=0)


def plan(free: int, *, work: TokenSizes = WORK, **changed: Any) -> MemoryPlan:
    """Of a model with 10 MiB of weights, whose layers keep 10 kB of each token."""
    given: dict[str, Any] = {
        "total_parameters": 5 * MIB,
        "trainable_parameters": 0,
        "optimizer_bytes": 0,
        "stored_bytes": 0,
        "layer": LayerBytes(
            saved_for_backward=10_000, input=1_000, forward=12_000, backward=10_000, cache=50, attention=0
        ),
        "num_layers": 10,
        "dtype_bytes": 2,
        "device": "cuda",  # whose allocator leaves no share of the activations unused
        "compiled": False,
        "loss_chunk_bytes": 0,
        "row_logits_bytes": 200,
        "work": work,
        "wanted_budget": None,
        "wanted_recomputed": None,
        "resident": 0,
    }
    return plan_memory(**{**given, "free": free, **changed})


def work(**changed: int) -> TokenSizes:
    return TokenSizes(
        **{
            name: changed.get(name, getattr(WORK, name))
            for name in ("longest", "largest_step", "held_out", "prompt", "num_prompts", "max_new_tokens")
        }
    )


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
    assert plan(free=free, work=work(held_out=7_000)).evaluation_bytes >= 7_000 * 12_000
    with pytest.raises(MachineError, match="one held-out example of 900,000 tokens needs"):
        plan(free=free, work=work(held_out=900_000))


def test_a_plan_close_to_the_memory_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = plan(free=80_000 * MIB)
    free = 100 * memory.peak_bytes
    monkeypatch.setattr("loratune.planning.memory.memory.free_bytes", lambda _: free)
    assert not wants_rehearsal(memory, "cpu")
    assert wants_rehearsal(memory, "cuda")
    free = 0
    assert wants_rehearsal(plan(free=80_000 * MIB, work=work(held_out=2_000_000)), "cpu")
