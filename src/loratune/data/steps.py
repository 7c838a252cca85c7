"""Which examples are in which step, rank and micro-batch: a pure function of lengths, never of what ran before.

    EpochPlan(lengths, batch_size=8, seed=42, epoch=0, token_budget=2048)[3]   →  Step 3 of epoch 0

One step is one optimizer update on `batch_size` examples. Its examples are cut into micro-batches of at most
`token_budget` tokens each, so memory decides how often the model is called, never what it learns. Resuming at step k
is indexing with k.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The examples of one optimizer update.

    Attributes:
        examples: All example numbers of the step, in the order of the epoch's shuffle.
        ranks: rank → micro-batch → example numbers. Every rank has the same number of micro-batches; a micro-batch is
            empty only when there are fewer examples than ranks.
    """

    examples: tuple[int, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """One pass over all examples, as steps that are computed when asked for.

    Attributes:
        lengths: Tokens of each example.
        batch_size: Examples per step, over all ranks. The last step of an epoch takes what is left.
        seed, epoch: Decide the order.
        token_budget: Tokens per micro-batch; a longer example is a micro-batch of its own.
        world_size: Number of ranks.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    epoch: int
    token_budget: int
    world_size: int = 1

    def __len__(self) -> int:
        return num_steps_per_epoch(len(self.lengths), self.batch_size)

    def __getitem__(self, index: int) -> Step:
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of an epoch of {len(self)}")
        examples = step_examples(
            len(self.lengths), batch_size=self.batch_size, seed=self.seed, epoch=self.epoch, index=index
        )
        lengths = {i: self.lengths[i] for i in examples}
        return Step(examples=examples, ranks=assign_to_ranks(lengths, self.token_budget, self.world_size))


def step_examples(num_examples: int, *, batch_size: int, seed: int, epoch: int, index: int) -> tuple[int, ...]:
    """The example numbers of a step of an epoch, whose lengths need not be known."""
    order = epoch_order(num_examples, seed=seed, epoch=epoch)
    return tuple(order[index * batch_size : (index + 1) * batch_size].tolist())


def num_steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last may be smaller."""
    return -(-num_examples // batch_size)


def num_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a whole run."""
    return math.ceil(epochs * num_steps_per_epoch(num_examples, batch_size))


def count_occurrences(every: str | float, *, steps: int, epochs: float, at_end: bool = True) -> int:
    """How often something with this cadence happens in a run.

    Args:
        every: The recipe's `eval_every`, `save_every` or `log_every`.
        steps: Optimizer steps of the run.
        epochs: Epochs of the run.
        at_end: Whether it also happens after the last step, as evaluating and saving do.
    """
    if isinstance(every, str):
        return {"never": 0, "epoch": math.ceil(epochs)}[every]
    interval = math.ceil(steps * every) if every < 1 else int(every)
    return steps // interval + (at_end and steps % interval != 0)


def trigger_steps(every: str | float, *, steps: int, num_per_epoch: int) -> list[int]:
    """After which steps something with this cadence happens that also happens after the last one. Arguments as in `occasions`."""
    if every == "never":
        return []
    interval = num_per_epoch if isinstance(every, str) else math.ceil(steps * every) if every < 1 else int(every)
    return [*range(interval, steps, interval), steps]


def step_tokens(lengths: Sequence[int], *, batch_size: int, seed: int) -> np.ndarray:
    """Tokens of each step of the first epoch, int64 [steps]."""
    shuffled = np.asarray(lengths)[epoch_order(len(lengths), seed=seed, epoch=0)]
    tokens: np.ndarray = np.add.reduceat(shuffled, np.arange(0, len(lengths), batch_size))
    return tokens


def padded_step_tokens(lengths: Sequence[int], *, batch_size: int, seed: int) -> np.ndarray:
    """The same where the examples of a step are padded to the longest."""
    shuffled = np.asarray(lengths)[epoch_order(len(lengths), seed=seed, epoch=0)]
    starts = np.arange(0, len(lengths), batch_size)
    tokens: np.ndarray = np.maximum.reduceat(shuffled, starts) * np.diff([*starts, len(lengths)])
    return tokens


def examples_of_largest_step(lengths: Sequence[int], *, batch_size: int, seed: int) -> list[int]:
    """The numbers of the examples of that step."""
    largest = int(step_tokens(lengths, batch_size=batch_size, seed=seed).argmax())
    return list(step_examples(len(lengths), batch_size=batch_size, seed=seed, epoch=0, index=largest))


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The shuffled example numbers of an epoch, int64 [num_examples]."""
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    order.setflags(write=False)
    return order


def pack(items: Sequence[tuple[int, int]], token_budget: int) -> list[tuple[int, ...]]:
    """Put (example, length) pairs into as few micro-batches as first-fit decreasing finds, each within the budget.

    First-fit decreasing needs at most 11/9 of the optimal number of bins plus 6/9 (Dósa 2007). An example longer than
    the budget gets a micro-batch of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for example, length in sorted(items, key=lambda item: (-item[1], item[0])):
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([])
            room.append(token_budget)
            place = len(bins) - 1
        bins[place].append(example)
        room[place] -= length
    return [tuple(chosen) for chosen in bins]


def assign_to_ranks(
    lengths: Mapping[int, int], token_budget: int, world_size: int = 1
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Pack a step's examples into micro-batches, and give every rank the same number of them.

    Args:
        lengths: Example number → its tokens.
        token_budget: Tokens per micro-batch.
        world_size: Number of ranks. A step takes as long as its slowest rank, so their tokens are kept alike.

    Returns:
        rank → micro-batch → example numbers.
    """
    bins = pack(list(lengths.items()), token_budget)
    if world_size == 1:
        return (tuple(bins),)
    bins = _balance(lengths, token_budget, multiple=world_size, at_least=len(bins))
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for start in range(0, len(bins), world_size):  # the heaviest of each row goes to the rank that has the least
        lightest = sorted(range(world_size), key=tokens.__getitem__)
        for rank, chosen in zip(lightest, bins[start : start + world_size], strict=True):
            ranks[rank].append(chosen)
            tokens[rank] += sum(lengths[i] for i in chosen)
    return tuple(tuple(rank) for rank in ranks)


def _balance(lengths: Mapping[int, int], token_budget: int, *, multiple: int, at_least: int) -> list[tuple[int, ...]]:
    """The same examples in micro-batches that are as alike as the longest-first rule makes them, the heaviest first: each example
    goes to the lightest one (Graham 1969, SIAM J. Appl. Math. 17(2)). The fewest that keep the budget, in multiples of the ranks."""
    longest_first = sorted(lengths, key=lambda i: (-lengths[i], i))
    count = -(-at_least // multiple) * multiple
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, number) for number in range(count)]
        for example in longest_first:
            tokens, number = heap[0]
            if bins[number] and tokens + lengths[example] > token_budget:
                break
            bins[number].append(example)
            heapq.heapreplace(heap, (tokens + lengths[example], number))
        else:
            return sorted(map(tuple, bins), key=lambda chosen: -sum(lengths[i] for i in chosen))
        count += multiple
