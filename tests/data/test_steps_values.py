"""Numbers of the step plan worked out by hand: a change of any of them changes what a recipe trains on."""

from __future__ import annotations

import pytest

from loratune.data.steps import (
    EpochPlan,
    assign_to_ranks,
    count_occurrences,
    epoch_order,
    examples_of_largest_step,
    num_steps,
    num_steps_per_epoch,
    pack,
    padded_step_tokens,
    step_examples,
    step_tokens,
    trigger_steps,
)


def test_the_order_of_a_seed_and_epoch_never_changes() -> None:
    """Runs that are resumed or reproduced with a later version rely on it."""
    assert epoch_order(10, seed=42, epoch=0).tolist() == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
    assert epoch_order(10, seed=42, epoch=1).tolist() == [0, 8, 7, 4, 3, 1, 2, 9, 6, 5]


def test_the_order_is_shared_and_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, seed=42, epoch=0)[0] = 1


def test_a_step_has_the_next_examples_of_the_order() -> None:
    order = epoch_order(10, seed=42, epoch=0).tolist()
    chosen = [step_examples(10, batch_size=4, seed=42, epoch=0, index=i) for i in range(3)]
    assert chosen == [tuple(order[:4]), tuple(order[4:8]), tuple(order[8:])]


def test_there_is_no_step_before_the_first() -> None:
    plan = EpochPlan(lengths=[1] * 10, batch_size=4, seed=42, epoch=0, token_budget=10)
    assert plan[0].examples == step_examples(10, batch_size=4, seed=42, epoch=0, index=0)
    assert plan[0].ranks == ((tuple(sorted(plan[0].examples)),),)
    with pytest.raises(IndexError, match="step -1 of an epoch of 3"):
        plan[-1]


def test_a_plan_without_ranks_is_for_one() -> None:
    assert len(EpochPlan(lengths=[1] * 10, batch_size=4, seed=42, epoch=0, token_budget=10)[0].ranks) == 1
    assert len(assign_to_ranks({0: 5, 1: 5}, 10)) == 1


def test_steps_of_a_run_round_a_part_of_an_epoch_up() -> None:
    assert num_steps_per_epoch(16, 8) == 2
    assert num_steps_per_epoch(17, 8) == 3
    assert num_steps(17, 8, 1.5) == 5
    assert num_steps(17, 8, 2) == 6


@pytest.mark.parametrize(
    ("every", "at_end", "expected"),
    [
        ("never", True, 0),
        ("epoch", True, 3),  # of 2.5 epochs, the last is a part
        (4, True, 3),  # 4, 8 and the last
        (4, False, 2),
        (5, True, 2),  # 10 is the last
        (1, True, 10),
        (0.25, True, 4),  # a quarter of 10 steps is rounded up: 3, 6, 9 and the last
        (0.25, False, 3),
        (11, True, 1),
    ],
)
def test_how_often_a_cadence_happens(every: str | float, at_end: bool, expected: int) -> None:
    assert count_occurrences(every, steps=10, epochs=2.5, at_end=at_end) == expected
    if at_end:
        assert count_occurrences(every, steps=10, epochs=2.5) == expected


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("never", []),
        ("epoch", [4, 8, 10]),
        (3, [3, 6, 9, 10]),
        (5, [5, 10]),
        (1, list(range(1, 11))),
        (0.25, [3, 6, 9, 10]),
        (11, [10]),
    ],
)
def test_after_which_steps_a_cadence_happens(every: str | float, expected: list[int]) -> None:
    assert trigger_steps(every, steps=10, num_per_epoch=4) == expected


def test_tokens_of_steps_padded_and_flat() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    order = epoch_order(10, seed=42, epoch=0).tolist()
    steps = [[lengths[i] for i in order[start : start + 4]] for start in (0, 4, 8)]
    assert step_tokens(lengths, batch_size=4, seed=42).tolist() == [sum(step) for step in steps]
    assert padded_step_tokens(lengths, batch_size=4, seed=42).tolist() == [max(step) * len(step) for step in steps]
    largest = max(range(3), key=lambda i: sum(steps[i]))
    assert examples_of_largest_step(lengths, batch_size=4, seed=42) == order[largest * 4 : largest * 4 + 4]


def test_packing_puts_the_longest_first_and_equal_ones_by_number() -> None:
    assert pack([(3, 5), (1, 5), (2, 5), (0, 10)], 10) == [(0,), (1, 2), (3,)]
    assert pack([(0, 30), (1, 10)], 10) == [(0,), (1,)], "a longer one is alone, and takes no room of others"
    assert pack([(0, 6), (1, 5), (2, 4), (3, 1)], 10) == [(0, 2), (1, 3)]


def test_ranks_get_as_many_tokens_as_each_other() -> None:
    lengths = {0: 8, 1: 7, 2: 6, 3: 5, 4: 4, 5: 3}
    # Two bins of at most 10 tokens do not do, four do. Each example goes to the lightest bin, and each row of bins, the
    # heaviest first, to the rank that has the least.
    assert assign_to_ranks(lengths, 10, 2) == (((2, 5), (0,)), ((3, 4), (1,)))


def test_a_rank_that_had_the_heavier_bin_gets_the_lighter_one_next() -> None:
    # Bins of 10, 8, 7 and 1 tokens: 10 and 8 first, then 7 to the rank with 8, which leaves 1 for the one with 10.
    assert assign_to_ranks({0: 10, 1: 8, 2: 7, 3: 1}, 10, 2) == (((0,), (3,)), ((1,), (2,)))


def test_a_bin_may_be_exactly_full() -> None:
    assert assign_to_ranks({0: 5, 1: 5, 2: 5, 3: 5}, 10, 2) == (((0, 2),), ((1, 3),))


def test_more_ranks_than_examples_leave_some_without_any() -> None:
    assert assign_to_ranks({0: 8}, 10, 2) == (((0,),), ((),))


def test_an_example_longer_than_the_budget_makes_no_endless_search() -> None:
    assert assign_to_ranks({0: 30, 1: 1}, 10, 2) == (((0,),), ((1,),))
