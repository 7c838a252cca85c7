"""The token budget of a run, and what happens when memory runs out all the same.

The step is repeated on the same examples with the same random numbers, in smaller micro-batches. Its gradient is the same
sum, so the run takes the recipe's steps; without dropout they are the same to float noise, with dropout the masks are
others of the same law, since they are drawn for a micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import torch

from loratune.data.examples import Example
from loratune.data.steps import pack
from loratune.model.device import free_memory, is_out_of_memory
from loratune.run import processes
from loratune.run.errors import MachineError
from loratune.training.event_log import EventLog

T = TypeVar("T")


class TokenBudget:
    """The most tokens of one micro-batch, halved whenever memory runs out.

    Args:
        tokens: To begin with.
        events: Where halving is told.
        together: Whether all processes have the same number of micro-batches, because they share the base's weights: then some may
            be empty, and where memory runs out in one of them all fail.

    Attributes:
        tokens: Now.
    """

    def __init__(self, tokens: int, events: EventLog, *, together: bool = False) -> None:
        self.tokens, self._together = tokens, together
        self._events = events
        self._under_way: list[Example] = []

    def micro_batches(self, examples: Sequence[Example], numbers: Iterable[int]) -> Iterator[tuple[int, ...]]:
        """The numbers of some of the examples, in micro-batches within the budget."""
        made = pack([(i, len(examples[i].input_ids)) for i in numbers], self.tokens)
        if self._together:
            made += [()] * (max(processes.gather(len(made))) - len(made))
        for chosen in made:
            self._under_way = [examples[i] for i in chosen]
            yield chosen
        self._under_way = []

    def largest_micro_batch(self, examples: Sequence[Example], limit: int) -> list[int]:
        """The numbers of the longest examples, at most `limit`, that go into one micro-batch."""
        longest = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))[:limit]
        ends = list(accumulate(len(examples[i].input_ids) for i in longest))
        return longest[: max(1, sum(end <= self.tokens for end in ends))]

    def retry(self, work: Callable[[], T], undo: Callable[[], None]) -> T:
        """Do work that goes through `micro_batches`; where memory runs out, halve the budget and do all of it again.

        Args:
            work: What to do.
            undo: Drops what a failed attempt left behind.

        Raises:
            MachineError: Not even one example fits.
        """
        while True:
            random = random_state()
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0]
            # Here the error is gone, and with it the frames that hold the failed attempt's tensors.
            undo()
            free_memory()
            set_random_state(random)
            self._halve(reason)

    def _halve(self, reason: str) -> None:
        lengths = [len(example.input_ids) for example in self._under_way]
        if self._together:
            raise MachineError(
                f"process {processes.rank()}: a micro-batch of {sum(lengths):,} tokens does not fit into memory: {reason}",
                fix=f"a train.token_budget below {self.tokens:,}; processes that share the base cannot make smaller ones alone",
            )
        if len(lengths) < 2:
            what = f"one example of {lengths[0]:,} tokens" if lengths else "the work around the micro-batches"
            file, line = (self._under_way[0].origin.file, self._under_way[0].origin.line) if lengths else (None, None)
            raise MachineError(
                f"{what} does not fit into memory: {reason}",
                file=file,
                line=line,
                fix="end other programs and `loratune resume`, or train anew with a smaller data.max_length, "
                "a larger train.recompute, or model.dtype: bfloat16",
            )
        self.tokens = min(self.tokens, sum(lengths)) // 2
        self._events.emit_local(
            "out_of_memory",
            f"out of memory in a micro-batch of {sum(lengths):,} tokens; it is repeated, and from here on a micro-batch "
            f"has at most {self.tokens:,} tokens",
            token_budget=self.tokens,
        )


def random_state() -> dict[str, torch.Tensor]:
    """Of torch's generators on all devices, which are all that a forward pass draws from; also for checkpoints."""
    states = {"cpu": torch.get_rng_state()}
    states.update({f"cuda{i:03d}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    """Put torch's generators back."""
    torch.set_rng_state(states["cpu"])
    gpus = [states[name] for name in sorted(states) if name.startswith("cuda")]
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])
