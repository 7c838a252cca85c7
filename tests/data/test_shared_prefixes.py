"""Sequences that begin alike are laid out once, and every sequence is still whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.batch import collate
from loratune.data.examples import Example, PairExample
from loratune.data.rows.row import Origin
from loratune.data.shared_prefixes import (
    LEAST_SHARED,
    common_prefixes,
    first_owners,
    num_distinct,
    pack_shared,
    prefix_tree,
    share_prefixes,
)
from loratune.data.steps import pack

ORIGIN = Origin(file="rows.jsonl", line=1)


def made(ids: list[int], supervised: list[int] | None = None) -> Example:
    """An example; every token is supervised unless places are given."""
    marks = np.ones(len(ids), dtype=bool)
    if supervised is not None:
        marks[:] = False
        marks[supervised] = True
    return Example(input_ids=np.array(ids, dtype=np.int32), supervised=marks, origin=ORIGIN)


# Two tokens only, so that prefixes are often equal; a part of the sequences starts as another one does.
sequences = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=7)


def arrays(ids: list[list[int]]) -> list[np.ndarray]:
    return [np.array(one, dtype=np.int32) for one in ids]


def num_nodes(ids: list[list[int]]) -> int:
    """Different prefixes: the nodes of a trie."""
    return len({tuple(one[: i + 1]) for one in ids for i in range(len(one))})


@given(sequences, st.integers(1, 5))
def test_the_path_of_every_sequence_is_the_sequence(ids: list[list[int]], least: int) -> None:
    tree = prefix_tree(arrays(ids), least)
    whole = np.concatenate(arrays(ids))
    flat = whole[tree.taken_F]
    assert (flat[tree.place_T] == whole).all()
    assert tree.boundaries[-1] == len(flat) == len(set(tree.place_T.tolist()))
    assert (tree.parents < np.arange(len(tree.parents))).all()
    starts = np.cumsum([0, *map(len, ids)])
    segment_of = np.repeat(np.arange(len(tree.parents)), np.diff(tree.boundaries))
    for first, end in pairwise(starts):
        places = tree.place_T[first:end]
        path = [int(segment_of[places[-1]])]
        while tree.parents[path[0]] >= 0:
            path.insert(0, int(tree.parents[path[0]]))
        tokens = np.concatenate([np.arange(tree.boundaries[s], tree.boundaries[s + 1]) for s in path])
        assert tokens.tolist() == places.tolist(), "the segments of the path, end to end, are the sequence"


@given(sequences, st.integers(1, 5))
def test_as_few_tokens_are_left_as_there_are_different_prefixes(ids: list[list[int]], least: int) -> None:
    assert num_distinct(arrays(ids), 1) == num_nodes(ids)
    left = num_distinct(arrays(ids), least)
    assert num_nodes(ids) <= left <= sum(map(len, ids))
    tree = prefix_tree(arrays(ids), least)
    shared = {int(parent) for parent in tree.parents if parent >= 0}
    for segment in shared:
        assert tree.boundaries[segment + 1] - tree.boundaries[segment] >= least


@given(sequences)
def test_common_prefixes_are_those_of_each_pair(ids: list[list[int]]) -> None:
    common = common_prefixes(arrays(ids))
    for i, one in enumerate(ids):
        for j, other in enumerate(ids):
            equal = [a == b for a, b in zip(one, other, strict=False)]
            assert common[i, j] == (equal.index(False) if False in equal else len(equal))


@given(sequences)
def test_the_owner_of_a_token_is_the_first_that_has_it_with_the_same_tokens_before(ids: list[list[int]]) -> None:
    numbers = [10 * i + 3 for i in range(len(ids))]
    owners = first_owners([made(one) for one in ids], numbers)
    for one, own in zip(ids, owners, strict=True):
        for place in range(len(one)):
            first = next(i for i, other in enumerate(ids) if other[: place + 1] == one[: place + 1])
            assert own[:, place].tolist() == [numbers[first], place]


def test_the_answers_of_a_pair_share_their_prompt() -> None:
    prompt = list(range(20))
    pair = PairExample.of(made([*prompt, 50, 51], [20, 21]), made([*prompt, 60], [20]), ORIGIN)
    (own,) = first_owners([pair], [7])
    assert own[1].tolist() == [*range(22), *range(20), 42]
    batch = share_prefixes(collate([pair]))
    assert batch.num_tokens == 23
    assert batch.input_ids[0].tolist() == [*prompt, 50, 51, 60]
    assert batch.predictors.tolist() == [19, 20, 19]
    assert batch.targets.tolist() == [50, 51, 60]


def test_a_shared_position_predicts_for_each_of_its_sequences() -> None:
    prompt = list(range(100, 120))
    examples = [made([*prompt, 1, 2], [5, 20, 21]), made([9, 8, 7]), made([*prompt, 3, 2], [5, 20])]
    plain, shared = collate(examples), share_prefixes(collate(examples))
    assert shared.targets.tolist() == plain.targets.tolist() == [105, 1, 2, 8, 7, 105, 3]
    assert shared.input_ids[0].tolist() == [*prompt, 1, 2, 3, 2, 9, 8, 7]
    assert shared.position_ids[0].tolist() == [*range(20), 20, 21, 20, 21, 0, 1, 2]
    assert shared.predictors.tolist() == [4, 19, 20, 24, 25, 4, 19]
    assert shared.tree is not None
    assert shared.tree.tolist() == [[0, 20, 22, 24, 27], [-1, 0, 0, -1, -1]]


def test_what_shares_too_little_keeps_its_order() -> None:
    examples = [made([5, 6, 7]), made([5, 2]), made([5, 4, 8])]
    plain, shared = collate(examples), share_prefixes(collate(examples))
    for name in ("input_ids", "position_ids", "boundaries", "predictors", "targets"):
        assert torch.equal(getattr(plain, name), getattr(shared, name)), name


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 120))
def test_examples_that_share_nothing_are_packed_as_before(lengths: list[int], budget: int) -> None:
    examples = [made([1000 + i, *range(length - 1)]) for i, length in enumerate(lengths)]
    assert pack_shared(examples, range(len(examples)), budget) == pack(list(enumerate(lengths)), budget)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=9), st.integers(1, 150))
def test_the_budget_counts_distinct_tokens(shapes: list[tuple[int, int]], budget: int) -> None:
    """Three system prompts of 30 tokens, and answers of their own."""
    examples = [
        made([*range(100 * kind, 100 * kind + 30), *range(1000 * i, 1000 * i + own)])
        for i, (kind, own) in enumerate(shapes, start=1)
    ]
    packed = pack_shared(examples, range(len(examples)), budget)
    assert sorted(i for chosen in packed for i in chosen) == list(range(len(examples)))
    for chosen in packed:
        tokens = share_prefixes(collate([examples[i] for i in chosen])).num_tokens
        kinds = {shapes[i][0] for i in chosen}
        assert tokens == 30 * len(kinds) + sum(shapes[i][1] for i in chosen)
        assert tokens <= budget or len(chosen) == 1


def test_examples_that_begin_alike_go_together() -> None:
    prompts = [list(range(40)), list(range(100, 140))]
    examples = [made([*prompts[i % 2], 500 + i, 501 + i]) for i in range(6)]
    assert LEAST_SHARED <= 40
    assert pack_shared(examples, range(6), 46) == [(0, 2, 4), (1, 3, 5)]
