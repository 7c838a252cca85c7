"""The examples of each step, as the datasets and samplers that transformers' trainer expects.

A step is looked up by its number in the step plan (`data.steps`), so a run resumed at step k reads step k and nothing
before it.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset, Sampler

from loratune.data.examples import Example
from loratune.data.prepared import Stream
from loratune.data.rows.row import Rejected
from loratune.data.shared_prefixes import first_owners
from loratune.data.steps import assign_to_ranks, epoch_order, num_steps_per_epoch, step_examples
from loratune.run import processes
from loratune.run.errors import LoratuneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    from loratune.recipe.recipe import TrainSection


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExamples:
    """This rank's part of an optimizer step.

    Attributes:
        examples: In the order of the epoch's shuffle.
        numbers: Index of each in the training data.
        left_out: Rows of streamed data that cannot be trained on.
        owners: For each example int64 [2, T]: the example and the position in it that first in this step, over all
            ranks, had each token with the same tokens before it. None: prefixes are not shared.
    """

    examples: list[Example]
    numbers: list[int]
    left_out: list[Rejected]
    owners: list[np.ndarray] | None = None


class StepDataset(Dataset[StepExamples | LoratuneError]):
    """A map from step number, counted from 0 over the entire run, to the step's examples on this rank.

    An error is returned, not raised: it may occur in a worker of the data loader, which would wrap it.

    Args:
        examples: Training examples of the run, or the stream of them.
        train: The recipe's section.
        token_budget: Tokens of a micro-batch; the same on all ranks, since it decides which rank gets which examples.
    """

    def __init__(self, examples: Sequence[Example] | Stream, train: TrainSection, token_budget: int) -> None:
        self._examples, self._batch_size, self._seed = examples, train.batch_size, train.seed
        self._token_budget = token_budget
        self._shares_prefixes = train.share_prefixes is True
        self.num_per_epoch = num_steps_per_epoch(len(examples), train.batch_size)

    def __len__(self) -> int:
        return self.num_per_epoch

    def __getitem__(self, number: int) -> StepExamples | LoratuneError:
        epoch, index = divmod(number, self.num_per_epoch)
        numbers = step_examples(
            len(self._examples), batch_size=self._batch_size, seed=self._seed, epoch=epoch, index=index
        )
        try:
            rows = {i: self._examples[i] for i in self._share(numbers)}
            owners = self._owners(numbers) if self._shares_prefixes else None
        except LoratuneError as error:
            return error
        examples = {i: row for i, row in rows.items() if isinstance(row, Example)}
        return StepExamples(
            examples=list(examples.values()),
            numbers=list(examples),
            left_out=[row for row in rows.values() if isinstance(row, Rejected)],
            owners=None if owners is None else [owners[i] for i in examples],
        )

    def _owners(self, numbers: tuple[int, ...]) -> dict[int, np.ndarray]:
        """Return the owners of the tokens of a step's examples on all ranks, whose order is that of the shuffle."""
        rows = {i: self._examples[i] for i in numbers}
        examples = {i: row for i, row in rows.items() if isinstance(row, Example)}
        return dict(zip(examples, first_owners(list(examples.values()), list(examples)), strict=True))

    def _share(self, numbers: tuple[int, ...]) -> list[int]:
        """Return the step's examples of this rank: balanced by tokens, or by number of examples for streamed data."""
        if processes.size() == 1:
            return list(numbers)
        if isinstance(self._examples, Stream):  # lengths would be known only after tokenizing every rank's examples
            return list(numbers[processes.rank() :: processes.size()])
        lengths = {i: len(self._examples[i].input_ids) for i in numbers}
        mine = {
            i
            for chosen in assign_to_ranks(lengths, self._token_budget, processes.size())[processes.rank()]
            for i in chosen
        }
        return [i for i in numbers if i in mine]

    def loader(self, steps_done: Callable[[], int]) -> DataLoader[StepExamples | LoratuneError]:
        """Return a loader of the current epoch's steps; streamed data is tokenized ahead in a worker process."""
        ahead: dict[str, Any] = {}
        if isinstance(self._examples, Stream):
            ahead |= {"num_workers": 1, "prefetch_factor": 4}
            ahead |= {"worker_init_fn": _as_worker, "multiprocessing_context": "fork"}
        sampler = GlobalSteps(self.num_per_epoch, steps_done)
        return DataLoader(self, batch_size=1, sampler=sampler, collate_fn=_only, **ahead)


def _as_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the tokenizer do not survive a fork


class GlobalSteps(Sampler[int]):
    """The numbers of the current epoch's steps, counted over the entire run."""

    def __init__(self, num_per_epoch: int, steps_done: Callable[[], int]) -> None:
        self._num_per_epoch = num_per_epoch
        self._steps_done = steps_done

    def __len__(self) -> int:
        return self._num_per_epoch

    def __iter__(self) -> Iterator[int]:
        first = self._steps_done() // self._num_per_epoch * self._num_per_epoch
        return iter(range(first, first + self._num_per_epoch))


class ExampleOrder(Sampler[int]):
    """The numbers of the current epoch's examples, in the step plan's order: what the plain engines train on."""

    def __init__(self, num_examples: int, train: TrainSection, steps_done: Callable[[], int]) -> None:
        self._num_examples, self._train, self._steps_done = num_examples, train, steps_done

    def __len__(self) -> int:
        return self._num_examples

    def __iter__(self) -> Iterator[int]:
        epoch = self._steps_done() // num_steps_per_epoch(self._num_examples, self._train.batch_size)
        return iter(epoch_order(self._num_examples, seed=self._train.seed, epoch=epoch).tolist())


class HeldOutDataset(Dataset[Example]):
    """The held-out examples; transformers only checks that there are some, `RunTrainer.evaluate` measures them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def _only(items: list[StepExamples | LoratuneError]) -> StepExamples | LoratuneError:
    (item,) = items
    return item
