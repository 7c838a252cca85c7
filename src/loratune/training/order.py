"""Which examples a step has, as the data sets and samplers that transformers' trainer asks for.

Everything is an index into the step plan, so a run that goes on at step k asks for step k, and touches nothing before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Dataset, Sampler

from loratune.data.render import Example
from loratune.data.steps import epoch_order, num_steps_per_epoch
from loratune.recipe import TrainSection


class Steps(Dataset[tuple[int, ...]]):
    """Step number, counted over the whole run from 0 → the numbers of its examples."""

    def __init__(self, num_examples: int, train: TrainSection) -> None:
        self._num_examples, self._batch_size, self._seed = num_examples, train.batch_size, train.seed
        self.num_per_epoch = num_steps_per_epoch(num_examples, train.batch_size)
        self._epoch, self._order = -1, epoch_order(0, seed=0, epoch=0)

    def __len__(self) -> int:
        return self.num_per_epoch

    def __getitem__(self, number: int) -> tuple[int, ...]:
        epoch, index = divmod(number, self.num_per_epoch)
        if epoch != self._epoch:  # a million examples take 20 ms to shuffle
            self._epoch, self._order = epoch, epoch_order(self._num_examples, seed=self._seed, epoch=epoch)
        return tuple(self._order[index * self._batch_size : (index + 1) * self._batch_size].tolist())


class GlobalSteps(Sampler[int]):
    """The numbers of the steps of the epoch that the trainer is in, counted over the whole run."""

    def __init__(self, num_per_epoch: int, steps_done: Callable[[], int]) -> None:
        self._num_per_epoch = num_per_epoch
        self._steps_done = steps_done

    def __len__(self) -> int:
        return self._num_per_epoch

    def __iter__(self) -> Iterator[int]:
        first = self._steps_done() // self._num_per_epoch * self._num_per_epoch
        return iter(range(first, first + self._num_per_epoch))


class ExampleOrder(Sampler[int]):
    """Example numbers of the epoch that the trainer is in, in the step plan's order."""

    def __init__(self, num_examples: int, train: TrainSection, steps_done: Callable[[], int]) -> None:
        self._num_examples, self._train, self._steps_done = num_examples, train, steps_done

    def __len__(self) -> int:
        return self._num_examples

    def __iter__(self) -> Iterator[int]:
        epoch = self._steps_done() // num_steps_per_epoch(self._num_examples, self._train.batch_size)
        return iter(epoch_order(self._num_examples, seed=self._train.seed, epoch=epoch).tolist())


class Held(Dataset[Example]):
    """The held-out examples, for transformers to see that there are some."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def only(items: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The one item of a batch of one."""
    (item,) = items
    return item
