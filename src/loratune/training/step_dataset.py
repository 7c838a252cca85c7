"""Which examples a step has, as the data sets and samplers that transformers' trainer asks for.

Everything is an index into the step plan, so a run that goes on at step k asks for step k, and touches nothing before.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from loratune.data.examples import Example
from loratune.data.prepare import Stream
from loratune.data.rows.conversation import Rejected
from loratune.data.steps import assign_to_ranks, epoch_order, num_steps_per_epoch, step_examples
from loratune.recipe.recipe import TrainSection
from loratune.run import processes
from loratune.run.errors import LoratuneError


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExamples:
    """What an optimizer step works on in this process.

    Attributes:
        examples: In the order of the epoch's shuffle; of several processes, the share of this one.
        left_out: Rows of streamed data that turned out to be no examples.
    """

    examples: list[Example]
    left_out: list[Rejected]


class StepDataset(Dataset[StepExamples | LoratuneError]):
    """Step number, counted over the whole run from 0 → its examples. An error is handed over, since it may arise in a worker.

    Args:
        examples: Of the whole run.
        train: The recipe's section.
        token_budget: Of a micro-batch, the same in all processes: it decides which of them has which examples.
    """

    def __init__(self, examples: Sequence[Example] | Stream, train: TrainSection, token_budget: int) -> None:
        self._examples, self._batch_size, self._seed = examples, train.batch_size, train.seed
        self._token_budget = token_budget
        self.num_per_epoch = num_steps_per_epoch(len(examples), train.batch_size)

    def __len__(self) -> int:
        return self.num_per_epoch

    def __getitem__(self, number: int) -> StepExamples | LoratuneError:
        epoch, index = divmod(number, self.num_per_epoch)
        numbers = step_examples(
            len(self._examples), batch_size=self._batch_size, seed=self._seed, epoch=epoch, index=index
        )
        try:
            made = [self._examples[i] for i in self._share(numbers)]
        except LoratuneError as error:
            return error
        return StepExamples(
            examples=[row for row in made if isinstance(row, Example)],
            left_out=[row for row in made if isinstance(row, Rejected)],
        )

    def _share(self, numbers: tuple[int, ...]) -> list[int]:
        """Those of the examples that this process takes: as many tokens as the others; of streams, as many examples."""
        if processes.size() == 1:
            return list(numbers)
        if isinstance(self._examples, Stream):  # its lengths are found out by making the examples
            return list(numbers[processes.rank() :: processes.size()])
        lengths = {i: len(self._examples[i].input_ids) for i in numbers}
        mine = {
            i
            for chosen in assign_to_ranks(lengths, self._token_budget, processes.size())[processes.rank()]
            for i in chosen
        }
        return [i for i in numbers if i in mine]

    def loader(self, steps_done: Callable[[], int]) -> DataLoader[StepExamples | LoratuneError]:
        """The steps of the epoch that the trainer is in. Streamed data is made examples in a process of its own, ahead."""
        ahead: dict[str, Any] = {}
        if isinstance(self._examples, Stream):
            ahead |= {"num_workers": 1, "prefetch_factor": 4}
            ahead |= {"worker_init_fn": _as_worker, "multiprocessing_context": "fork"}
        sampler = GlobalSteps(self.num_per_epoch, steps_done)
        return DataLoader(self, batch_size=1, sampler=sampler, collate_fn=_only, **ahead)


def _as_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the tokenizer do not survive a fork


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


class HeldOutDataset(Dataset[Example]):
    """The held-out examples, for transformers to see that there are some."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def _only(items: list[StepExamples | LoratuneError]) -> StepExamples | LoratuneError:
    (item,) = items
    return item
