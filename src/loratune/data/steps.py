"""Which examples are in which step, rank and micro-batch: a pure function of lengths, independent of what ran before.

    EpochPlan(lengths, batch_size=8, seed=42, epoch=0, token_budget=2048)[3]   →  Step 3 of epoch 0

One step is one optimizer update on `batch_size` examples. Its examples are packed into micro-batches of at most
`token_budget` tokens each, so memory decides how often the model is called, never what it learns. Resuming at step k
is indexing with k.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The examples of one optimizer update.

    Attributes:
        examples: Numbers of all examples of the step, in the order of the epoch's shuffle.
        ranks: rank → micro-batch → example numbers. Every rank has the same number of micro-batches; a micro-batch is
            empty only if there are fewer examples than ranks.
    """

    examples: tuple[int, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """One pass over all examples, as steps that are computed on demand.

    Attributes:
        lengths: Tokens of each example.
        batch_size: Examples per step, over all ranks. The last step of an epoch gets the remainder.
        seed: Seed of the shuffle.
        epoch: Number of the epoch, from 0; each has its own order.
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
    """Return the example numbers of a step of an epoch, without their lengths."""
    order = epoch_order(num_examples, seed=seed, epoch=epoch)
    return tuple(order[index * batch_size : (index + 1) * batch_size].tolist())


def num_steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return the optimizer steps of one epoch; the last may be smaller."""
    return -(-num_examples // batch_size)


def num_steps(num_examples: int, batch_size: int, epochs: float) -> int:
    """Return the optimizer steps of a run."""
    return math.ceil(epochs * num_steps_per_epoch(num_examples, batch_size))


def epochs_of(steps: int, per_epoch: int) -> float:
    """Return the epochs of a run of so many steps, such that `num_steps` returns these steps again."""
    epochs = steps / per_epoch
    while math.ceil(epochs * per_epoch) > steps:  # the product is rounded, possibly upwards
        epochs = math.nextafter(epochs, 0)
    return epochs


def count_occurrences(every: str | float, *, steps: int, epochs: float, at_end: bool = True) -> int:
    """Count how often something with this cadence happens in a run.

    Args:
        every: The recipe's `eval_every`, `save_every` or `log_every`.
        steps: Optimizer steps of the run.
        epochs: Epochs of the run.
        at_end: Whether it also happens after the last step, like evaluation and saving.
    """
    if isinstance(every, str):
        return {"never": 0, "epoch": math.ceil(epochs)}[every]
    interval = math.ceil(steps * every) if every < 1 else int(every)
    return steps // interval + (at_end and steps % interval != 0)


def trigger_steps(every: str | float, *, steps: int, num_per_epoch: int) -> list[int]:
    """Return the steps after which something with this cadence happens, including the last step.

    Args:
        every: The recipe's `eval_every` or `save_every`.
        steps: Optimizer steps of the run.
        num_per_epoch: Optimizer steps of one epoch.
    """
    if every == "never":
        return []
    interval = num_per_epoch if isinstance(every, str) else math.ceil(steps * every) if every < 1 else int(every)
    return [*range(interval, steps, interval), steps]


def step_tokens(lengths: Sequence[int], *, batch_size: int, seed: int) -> np.ndarray:
    """Return the tokens of each step of the first epoch, int64 [steps]."""
    shuffled = np.asarray(lengths)[epoch_order(len(lengths), seed=seed, epoch=0)]
    tokens: np.ndarray = np.add.reduceat(shuffled, np.arange(0, len(lengths), batch_size))
    return tokens


def padded_step_tokens(lengths: Sequence[int], *, batch_size: int, seed: int) -> np.ndarray:
    """Return the same with the examples of a step padded to the longest, int64 [steps]."""
    shuffled = np.asarray(lengths)[epoch_order(len(lengths), seed=seed, epoch=0)]
    starts = np.arange(0, len(lengths), batch_size)
    tokens: np.ndarray = np.maximum.reduceat(shuffled, starts) * np.diff([*starts, len(lengths)])
    return tokens


def examples_of_largest_step(lengths: Sequence[int], *, batch_size: int, seed: int) -> list[int]:
    """Return the numbers of the examples of the step with the most tokens in the first epoch."""
    largest = int(step_tokens(lengths, batch_size=batch_size, seed=seed).argmax())
    return list(step_examples(len(lengths), batch_size=batch_size, seed=seed, epoch=0, index=largest))


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled example numbers of an epoch, int64 [num_examples]."""
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
    """Pack a step's examples into micro-batches and give every rank the same number of them.

    Args:
        lengths: Example number → its tokens.
        token_budget: Tokens per micro-batch.
        world_size: Number of ranks. A step takes as long as its slowest rank, so their tokens are balanced.

    Returns:
        rank → micro-batch → example numbers.
    """
    bins = pack(list(lengths.items()), token_budget)
    if world_size == 1:
        return (tuple(bins),)
    bins = _balance(lengths, token_budget, multiple=world_size, at_least=len(bins))
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for start in range(0, len(bins), world_size):  # the heaviest of each row goes to the rank with the fewest tokens
        lightest = sorted(range(world_size), key=tokens.__getitem__)
        for rank, chosen in zip(lightest, bins[start : start + world_size], strict=True):
            ranks[rank].append(chosen)
            tokens[rank] += sum(lengths[i] for i in chosen)
    return tuple(tuple(rank) for rank in ranks)


def _balance(lengths: Mapping[int, int], token_budget: int, *, multiple: int, at_least: int) -> list[tuple[int, ...]]:
    """Balance examples over the fewest micro-batches that keep the budget and are a multiple of the ranks; heaviest
    first."""
    # Longest first, each to the lightest micro-batch: at most 4/3 of the optimum (Graham 1969, SIAM J. Appl. Math.).
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
