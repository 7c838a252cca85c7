"""Numbers of the memory plan worked out by hand, for the small imagined model of `records`."""

from __future__ import annotations

import pytest

from loratune.planning.memory import memory
from loratune.planning.memory.memory import generation_bytes, per_token_bytes, wants_rehearsal
from loratune.planning.memory.overhead import (
    CONTEXT_BYTES,
    GPU_OVERHEAD_FRACTION,
    HEAP_OVERHEAD_FRACTION,
    SIZES_BYTES,
)
from loratune.run.errors import MachineError
from tests.planning.memory.records import MODEL, WORK, plan

FIXED = 2_000_000 + 100_000 * (8 + 2) + 800_000 + (2 * 1000 + 1000 // 2)
"""Weights; adapter with its gradient and its bfloat16 copy; optimizer; a chunk of logits with its working copies."""


def least_free(**changes: object) -> int:
    """Return the fewest free bytes with which a plan is made."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(**{**changes, "free_bytes": middle})
            high = middle
        except MachineError:
            low = middle
    return high


def test_a_token_costs_what_layers_save_and_one_layer_of_gradients() -> None:
    assert per_token_bytes(MODEL, 0) == 10 * 1000 + 300
    assert per_token_bytes(MODEL, 1) == 9 * 1000 + 100 + 300 + 1000, "the recomputed layer runs again"
    assert per_token_bytes(MODEL, 10) == 10 * 100 + 300 + 1000


def test_one_example_with_every_layer_recomputed_is_the_least_that_fits() -> None:
    needed = FIXED + CONTEXT_BYTES["cuda"] + int(100 * per_token_bytes(MODEL, 10) * 1.05)
    assert least_free(token_budget=None) == pytest.approx(needed / memory.PLANNABLE_FRACTION, abs=100)


def test_gaps_that_a_run_will_leave_need_room() -> None:
    few, many = (least_free(device="cpu", dtype_bytes=4, num_sizes=number) for number in (0, 28))
    assert many - few == pytest.approx(SIZES_BYTES / memory.PLANNABLE_FRACTION, abs=100)


def test_the_refusal_says_what_the_least_plan_needs() -> None:
    needed = FIXED + CONTEXT_BYTES["cuda"] + 2_000_000 * per_token_bytes(MODEL, 10)
    with pytest.raises(MachineError, match=rf"one example of 2,000,000 tokens needs {needed / 2**30:.1f} GiB"):
        plan(longest=2_000_000, largest_step=2_000_000, free_bytes=2**30)


def test_float32_weights_need_no_copy_of_the_adapter() -> None:
    assert plan(dtype_bytes=4).adapter_bytes == 100_000 * 8
    assert plan(dtype_bytes=2).adapter_bytes == 100_000 * 10


@pytest.mark.parametrize(("asked", "planned"), [(0, 0), (3, 3), (10, 10), (99, 10)])
def test_a_recipe_decides_the_recomputed_layers_up_to_all(asked: int, planned: int) -> None:
    assert plan(num_recomputed=asked).num_recomputed == planned


def test_layers_are_recomputed_only_if_a_byte_is_missing() -> None:
    room = 100 * per_token_bytes(MODEL, 0)
    fewest = [memory._fewest_recomputed(MODEL, WORK, 100, range(11), free) for free in (room, room - 1)]
    assert fewest == [0, 2], "one recomputed layer costs more than none"


@pytest.mark.parametrize(("budget", "tokens"), [(50, 100), (400, 400), (9000, 800)])
def test_a_micro_batch_has_an_example_at_least_and_a_step_at_most(budget: int, tokens: int) -> None:
    assert plan(token_budget=budget).activation_bytes == tokens * 10 * 1000
    assert plan(token_budget=budget, held_out=10).evaluation_bytes == max(10, min(budget, 800)) * 400 + 2500


def test_a_run_without_held_out_examples_and_prompts_plans_no_evaluation() -> None:
    assert plan(held_out=0).evaluation_bytes == 0


def test_answers_that_take_more_than_a_step_replace_all_that_a_step_alone_needs() -> None:
    made = plan(prompt=60_000, num_prompts=1, max_new_tokens=60, variant_bytes=70_000)
    assert made.evaluation_bytes == 60_060 * (11 * 50 + 400)
    kept = 2_000_000 + 100_000 * (8 + 2) + 800_000 + 70_000
    assert made.peak_bytes == kept + made.process_bytes + made.allocator_bytes + made.evaluation_bytes


def test_fragmentation_grows_with_the_activations() -> None:
    activations = 400 * 10 * 1000
    assert plan().allocator_bytes == pytest.approx(activations * GPU_OVERHEAD_FRACTION, abs=1)
    eager = plan(device="cpu", dtype_bytes=4, num_sizes=0)
    assert eager.allocator_bytes == pytest.approx(activations * HEAP_OVERHEAD_FRACTION["float32"], abs=1)


@pytest.mark.parametrize(("free", "wanted"), [(2**40, False), (1000, True)])
def test_a_cpu_rehearses_when_the_plan_comes_close_to_what_the_process_can_have(
    free: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan()
    resident = int(planned.peak_bytes / memory.REHEARSAL_FRACTION) - 500
    monkeypatch.setattr(memory, "resident_bytes", lambda: resident)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
    assert wants_rehearsal(planned, "cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    assert not wants_rehearsal(planned, "cpu"), "free and resident bytes add up"
    assert wants_rehearsal(planned, "cuda")
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    assert wants_rehearsal(planned, "cpu") is wanted


def test_a_generated_token_holds_keys_values_and_its_share_of_the_logits() -> None:
    assert generation_bytes(MODEL, WORK) == 11 * 50 + 400 + 2 * 4000 // 1
    assert plan(prompt=6, max_new_tokens=2, num_prompts=1, held_out=0).evaluation_bytes == 8 * (11 * 50 + 400 + 1000)
