"""Sequences that begin with the same tokens: what they share, and micro-batches that contain each shared token once.

    three sequences   S y s t e m A A     a prefix tree    S y s t e m ─┬─ A A         flat   S y s t e m A A B B x C
                      S y s t e m B B x                                 ├─ B B x       12 tokens in place of 24
                      S y s t e m C                                     └─ C

Equal tokens with equal tokens before them have equal hidden states, whichever sequence they are in. What sequences
share is decided by their token ids alone; positions restart with each sequence, so they are equal there too.

Shapes: N sequences, T tokens of a micro-batch as `collate` makes it, F ≤ T of them that are left, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from loratune.data.batch import MicroBatch
    from loratune.data.examples import Example

    Ids = npt.NDArray[np.int32]

SHARING_DEVICE = "cpu"
"""The type of device that computes equal prefixes once: attention to them has been measured on no other."""

LEAST_SHARED = 16
"""Tokens of a prefix from which on it is a segment of its own. A segment costs a block of attention more."""


class Distinct(NamedTuple):
    """The U different pairs of position and next token among S predictions.

    Attributes:
        first_U: int64; the first prediction of each pair, among the S.
        counts_U: float32; how many predictions each pair stands for.
        of_S: int64; the pair of each prediction, among the U.
    """

    first_U: torch.Tensor  # noqa: N815 - a shape
    counts_U: torch.Tensor  # noqa: N815
    of_S: torch.Tensor  # noqa: N815


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTree:
    """Sequences as paths through segments, each of which is laid out once.

    Attributes:
        taken_F: int64, for each token that is left its place among the tokens of all sequences end to end.
        place_T: int64, for each of those tokens its place among the ones that are left.
        boundaries: int64 [S + 1]; segment s occupies tokens boundaries[s] to boundaries[s + 1] - 1.
        parents: int64 [S]; the segment that comes before segment s in its sequences, always an earlier one; -1: none.
    """

    taken_F: npt.NDArray[np.int64]  # noqa: N815 - a shape
    place_T: npt.NDArray[np.int64]  # noqa: N815
    boundaries: npt.NDArray[np.int64]
    parents: npt.NDArray[np.int64]


def common_prefixes(sequences: Sequence[Ids]) -> npt.NDArray[np.int32]:
    """Return the length of the common prefix of each two sequences, [N, N]; the diagonal is their own lengths."""
    order, neighbors = _sorted(sequences)
    common = np.zeros((len(order), len(order)), dtype=np.int32)
    for i, number in enumerate(order):
        # In sorted order, what two sequences share is the least that neighbors between them share.
        shared = np.minimum.accumulate(neighbors[i:])
        common[number, order[i + 1 :]] = common[order[i + 1 :], number] = shared
        common[number, number] = len(sequences[number])
    return common


def _sorted(sequences: Sequence[Ids]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the numbers of the sequences in the order of their token ids, and what each shares with the next."""
    # As big-endian bytes, ids compare as numbers do, and a prefix comes before what it begins.
    keys = [np.asarray(ids).astype(">u4").tobytes() for ids in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    neighbors = [_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    return np.array(order, dtype=np.int64), np.array(neighbors, dtype=np.int64)


def _common(one: Ids, other: Ids) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def prefix_tree(sequences: Sequence[Ids], least: int = LEAST_SHARED) -> PrefixTree:
    """Lay out sequences so that each prefix of at least `least` tokens that several share appears once.

    Sequences keep their order, except that those that branch off at the same token lie together.
    """
    order, neighbors = _sorted(sequences)
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])])
    place_T = np.empty(starts[-1], dtype=np.int64)
    taken: list[npt.NDArray[np.int64]] = []
    boundaries, parents = [0], []
    groups = [(0, len(order), 0, -1)] if len(order) else []  # sequences order[first:end] have `done` tokens laid out
    while groups:
        first, end, done, parent = groups.pop()
        members = np.sort(order[first:end])
        between = neighbors[first : end - 1]
        shared = len(sequences[members[0]]) if len(members) == 1 else int(between.min())
        if shared > done and (len(members) == 1 or shared - done >= least):
            length = shared - done
            taken.append(np.arange(starts[members[0]] + done, starts[members[0]] + shared))
            for member in members:
                place_T[starts[member] + done : starts[member] + shared] = np.arange(length) + boundaries[-1]
            boundaries.append(boundaries[-1] + length)
            parents.append(parent)
            done, parent = shared, len(parents) - 1
        if len(members) > 1:
            cuts = [first, *(first + 1 + np.flatnonzero(between == shared)), end]
            parts = [(int(a), int(b), done, parent) for a, b in pairwise(cuts)]
            groups += sorted(parts, key=lambda part: -order[part[0] : part[1]].min())
    return PrefixTree(
        taken_F=np.concatenate(taken) if taken else np.empty(0, dtype=np.int64),
        place_T=place_T,
        boundaries=np.array(boundaries),
        parents=np.array(parents, dtype=np.int64),
    )


def share_prefixes(batch: MicroBatch, least: int = LEAST_SHARED) -> MicroBatch:
    """Return a micro-batch, on the host, in which tokens that several sequences share stand once.

    What each sequence predicts stays, in the same order; `predictors` then name a shared position once per sequence.
    """
    ids_T = batch.input_ids[0].numpy().astype(np.int32)
    tree = prefix_tree(np.split(ids_T, batch.host_boundaries[1:-1].tolist()), least)
    taken_F, place_T = torch.from_numpy(tree.taken_F), torch.from_numpy(tree.place_T)
    predictors = place_T[batch.predictors]
    boundaries = torch.from_numpy(tree.boundaries.astype(np.int32))
    parents = torch.from_numpy(np.append(tree.parents, -1).astype(np.int32))
    return replace(
        batch,
        input_ids=batch.input_ids[:, taken_F],
        position_ids=batch.position_ids[:, taken_F],
        boundaries=boundaries,
        host_boundaries=boundaries,
        tree=torch.stack([boundaries, parents]),
        predictors=predictors,
        distinct=_distinct(predictors, batch.targets),
        rows=None if batch.rows is None else batch.rows[taken_F],
    )


def _distinct(predictors_S: torch.Tensor, targets_S: torch.Tensor) -> Distinct | None:
    """Return the different pairs of predictors and targets; None if all are."""
    pairs_S = predictors_S.numpy() << 32 | targets_S.numpy()
    _, first_U, of_S, counts_U = np.unique(pairs_S, return_index=True, return_inverse=True, return_counts=True)
    if len(first_U) == len(pairs_S):
        return None
    return Distinct(torch.from_numpy(first_U), torch.from_numpy(counts_U).float(), torch.from_numpy(of_S))


def first_owners(examples: Sequence[Example], numbers: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Return for each token of a step which example and position first had it with the same tokens before it.

    Args:
        examples: All examples of a step, over all ranks, in its order.
        numbers: The number of each in the training data.

    Returns:
        For each example int64 [2, T]: the number of an example, and a place among its tokens.
    """
    ids, owners = [], []
    for example, number in zip(examples, numbers, strict=True):
        place = 0
        for sequence in example.sequences:
            length = len(sequence.input_ids)
            ids.append(sequence.input_ids)
            owners.append(np.stack([np.full(length, number), np.arange(place, place + length)]))
            place += length
    common = common_prefixes(ids)
    for i in range(1, len(ids)):
        earlier = int(common[i, :i].argmax())
        shared = common[i, earlier]
        owners[i][:, :shared] = owners[earlier][:, :shared]
    parts = iter(owners)
    return [np.concatenate([next(parts) for _ in example.sequences], axis=1) for example in examples]


def num_distinct(sequences: Sequence[Ids], least: int = LEAST_SHARED) -> int:
    """Count the tokens of these sequences that are left when shared prefixes are laid out once."""
    return len(prefix_tree(sequences, least).taken_F)


def pack_shared(examples: Sequence[Example], numbers: Sequence[int], token_budget: int) -> list[tuple[int, ...]]:
    """Put examples into micro-batches, those that begin with the same tokens together, each within the budget of
    distinct tokens.

    First-fit decreasing, as `steps.pack`, but the micro-batches that share most with an example are tried first.

    Args:
        examples: The examples.
        numbers: Which of them to put.
        token_budget: Tokens of a micro-batch; a longer example gets one of its own.

    Returns:
        The micro-batches, as indices into `examples`.
    """
    parts = {i: [sequence.input_ids for sequence in examples[i].sequences] for i in numbers}
    size = {i: num_distinct(own) if len(own) > 1 else len(own[0]) for i, own in parts.items()}
    firsts = dict(zip(parts, np.cumsum([0, *map(len, parts.values())]).tolist(), strict=False))
    rows = {i: np.arange(firsts[i], firsts[i] + len(own)) for i, own in parts.items()}
    common = common_prefixes([ids for own in parts.values() for ids in own])
    bins: list[list[int]] = []
    tokens: list[int] = []
    most = np.zeros((len(parts), len(common)), dtype=np.int32)  # what each sequence shares with each micro-batch
    for i in sorted(parts, key=lambda i: (-size[i], i)):
        shared = most[: len(bins), rows[i]].max(axis=1).tolist()
        for place in sorted(range(len(bins)), key=lambda place: (-shared[place], place)):
            together = tokens[place] + size[i]
            if shared[place] >= LEAST_SHARED:
                together = num_distinct([ids for j in (*bins[place], i) for ids in parts[j]])
            if together <= token_budget:
                bins[place].append(i)
                tokens[place] = together
                break
        else:
            place = len(bins)
            bins.append([i])
            tokens.append(size[i])
        most[place] = np.maximum(most[place], common[rows[i]].max(axis=0))
    return [tuple(chosen) for chosen in bins]
