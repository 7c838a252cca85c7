from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loratune.data.steps import (
    EpochPlan,
    assign_to_ranks,
    epoch_order,
    epochs_of,
    num_steps,
    num_steps_per_epoch,
    pack,
    step_tokens,
)

lengths_of_examples = st.lists(st.integers(1, 400), min_size=1, max_size=60)


def plan_of(
    lengths: list[int], batch_size: int = 8, budget: int = 500, world_size: int = 1, epoch: int = 0
) -> EpochPlan:
    return EpochPlan(
        lengths=lengths, batch_size=batch_size, seed=1, epoch=epoch, token_budget=budget, world_size=world_size
    )


@given(lengths_of_examples, st.integers(1, 20), st.integers(1, 1000), st.integers(1, 4))
def test_an_epoch_has_every_example_once_whatever_budget_and_ranks(
    lengths: list[int], batch_size: int, budget: int, world_size: int
) -> None:
    plan = plan_of(lengths, batch_size, budget, world_size)
    steps = [plan[i] for i in range(len(plan))]
    seen = [i for step in steps for rank in step.ranks for micro_batch in rank for i in micro_batch]
    assert sorted(seen) == list(range(len(lengths)))
    for step in steps:
        assert sorted(step.examples) == sorted(i for rank in step.ranks for batch in rank for i in batch)


@given(lengths_of_examples, st.integers(1, 20), st.integers(1, 1000), st.integers(1, 1000))
def test_the_budget_does_not_decide_which_examples_are_in_a_step(
    lengths: list[int], batch_size: int, budget: int, other: int
) -> None:
    plans = [plan_of(lengths, batch_size, tokens, ranks) for tokens, ranks in ((budget, 1), (other, 1), (budget, 3))]
    assert len({tuple(plan[i].examples for i in range(len(plan))) for plan in plans}) == 1


@given(lengths_of_examples, st.integers(1, 1000), st.integers(1, 4))
def test_ranks_have_the_same_number_of_micro_batches(lengths: list[int], budget: int, world_size: int) -> None:
    plan = plan_of(lengths, 16, budget, world_size)
    for i in range(len(plan)):
        assert len({len(rank) for rank in plan[i].ranks}) == 1
        assert len(plan[i].ranks) == world_size


@given(lengths_of_examples, st.integers(1, 1000))
def test_a_micro_batch_exceeds_the_budget_only_when_one_example_does(lengths: list[int], budget: int) -> None:
    for chosen in pack(list(enumerate(lengths)), budget):
        assert sum(lengths[i] for i in chosen) <= budget or len(chosen) == 1


@given(lengths_of_examples, st.integers(1, 1000), st.integers(2, 4))
@example([3, 3, 2, 2, 2], 6, 2)  # which two micro-batches hold, but not if each example goes to the lighter one
def test_nor_does_it_where_several_ranks_share_a_step(lengths: list[int], budget: int, world_size: int) -> None:
    for rank in assign_to_ranks(dict(enumerate(lengths)), budget, world_size):
        for chosen in rank:
            assert sum(lengths[i] for i in chosen) <= budget or len(chosen) == 1


def test_packing_fills_what_a_person_would_fill() -> None:
    assert pack([(0, 60), (1, 50), (2, 40), (3, 50)], 100) == [(0, 2), (1, 3)]


def test_epochs_differ_and_repeat_exactly() -> None:
    assert epoch_order(50, seed=1, epoch=0).tolist() == epoch_order(50, seed=1, epoch=0).tolist()
    assert epoch_order(50, seed=1, epoch=0).tolist() != epoch_order(50, seed=1, epoch=1).tolist()
    assert epoch_order(50, seed=1, epoch=0).tolist() != epoch_order(50, seed=2, epoch=0).tolist()


def test_the_last_step_takes_what_is_left() -> None:
    plan = plan_of([10] * 19)
    assert [len(plan[i].examples) for i in range(len(plan))] == [8, 8, 3]
    assert num_steps_per_epoch(19, 8) == 3
    with pytest.raises(IndexError, match="step 3 of an epoch of 3"):
        plan[3]


def test_the_tokens_of_the_steps_are_those_of_the_plan() -> None:
    lengths = [(7 * i) % 31 + 1 for i in range(53)]
    plan = plan_of(lengths)
    sums = [sum(lengths[i] for i in plan[step].examples) for step in range(len(plan))]
    assert step_tokens(lengths, batch_size=8, seed=1).tolist() == sums


@given(lengths_of_examples, st.integers(1, 1000), st.integers(2, 5))
def test_ranks_differ_by_no_more_than_one_example(lengths: list[int], budget: int, world_size: int) -> None:
    ranks = assign_to_ranks(dict(enumerate(lengths)), budget, world_size)
    batches = [chosen for rank in ranks for chosen in rank]
    assert sorted(i for chosen in batches for i in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in chosen) <= budget or len(chosen) == 1 for chosen in batches if chosen)
    tokens = [sum(lengths[i] for chosen in rank for i in chosen) for rank in ranks]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


def test_tokens_are_balanced_over_ranks() -> None:
    plan = plan_of([100, 200, 300, 400] * 8, batch_size=32, budget=800, world_size=2)
    first, second = (sum(plan.lengths[i] for batch in rank for i in batch) for rank in plan[0].ranks)
    assert first == second


def test_a_step_that_is_a_little_more_than_the_budget_is_shared_evenly() -> None:
    first, second = assign_to_ranks(dict.fromkeys(range(24), 100), 2000, 2)
    assert [len(chosen) for chosen in first] == [len(chosen) for chosen in second] == [12]


@given(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(1, 512))
def test_the_epochs_of_a_number_of_steps_make_just_these_steps(steps: int, num_examples: int, batch_size: int) -> None:
    epochs = epochs_of(steps, num_steps_per_epoch(num_examples, batch_size))
    assert num_steps(num_examples, batch_size, epochs) == steps
