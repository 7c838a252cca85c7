"""The token budget of a micro-batch, and recovery when memory runs out anyway.

The step is repeated on the same examples in smaller micro-batches. Its gradient is the same sum, with the same dropout
masks (`kernels.dropout`), so the run still takes the recipe's steps, equal up to float rounding. Random states are put
back for models that have dropout of their own, whose masks then differ but have the same distribution.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch

from loratune.data.shared_prefixes import num_distinct, pack_shared
from loratune.data.steps import pack
from loratune.model.device import free_memory, is_out_of_memory
from loratune.run import processes
from loratune.run.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from loratune.data.examples import Example
    from loratune.training.event_log import EventLog

T = TypeVar("T")


class TokenBudget:
    """The largest number of tokens in a micro-batch, halved whenever memory runs out.

    Args:
        tokens: The budget at the start.
        events: Where halving is reported.
        together: Whether all ranks need the same number of micro-batches, because they share the base's weights. Some
            may then be empty, and running out of memory on one rank ends the run on all.

    Attributes:
        tokens: The budget now.
    """

    def __init__(self, tokens: int, events: EventLog, *, together: bool = False) -> None:
        self.tokens, self._together = tokens, together
        self._events = events
        self._current: list[Example] = []  # the examples of the running micro-batch, for messages
        self._shared = False  # whether their common tokens count once

    def micro_batches(
        self, examples: Sequence[Example], numbers: Iterable[int], *, shared: bool = False
    ) -> Iterator[tuple[int, ...]]:
        """Yield micro-batches within the budget, as indices into `examples`; of these only `numbers` are used.

        With `shared`, examples that begin with the same tokens are grouped, and their common tokens count once.
        """
        if shared:
            micro_batches = pack_shared(examples, list(numbers), self.tokens)
        else:
            micro_batches = pack([(i, len(examples[i].input_ids)) for i in numbers], self.tokens)
        if self._together:
            micro_batches += [()] * (max(processes.gather(len(micro_batches))) - len(micro_batches))
        self._shared = shared
        for chosen in micro_batches:
            self._current = [examples[i] for i in chosen]
            yield chosen
        self._current = []

    def largest_micro_batch(self, examples: Sequence[Example], limit: int) -> list[int]:
        """Return the indices of the longest examples that fit into one micro-batch, at most `limit` of them."""
        longest = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))[:limit]
        ends = list(accumulate(len(examples[i].input_ids) for i in longest))
        return longest[: max(1, sum(end <= self.tokens for end in ends))]

    def retry(self, work: Callable[[], T], undo: Callable[[], None]) -> T:
        """Call `work`, which goes through `micro_batches`; if memory runs out, halve the budget and call it again.

        Args:
            work: What to do.
            undo: Drops what a failed attempt left behind, such as gradients.

        Raises:
            OutOfMemory: Not even one example fits.
        """
        while True:
            random = random_state()
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0]
            # Only outside of `except`: the error's traceback holds the frames with the failed attempt's tensors.
            undo()
            free_memory()
            set_random_state(random)
            self._halve(reason)

    def _halve(self, reason: str) -> None:
        lengths = [len(example.input_ids) for example in self._current]
        if self._together:
            raise OutOfMemory(
                f"process {processes.rank()}: a micro-batch of {sum(lengths):,} tokens does not fit into memory: "
                f"{reason}",
                fix=f"a train.token_budget below {self.tokens:,}; with a shared base, no process can reduce it alone",
            )
        if len(lengths) < 2:
            what = f"one example of {lengths[0]:,} tokens" if lengths else "the work around the micro-batches"
            file, line = (self._current[0].origin.file, self._current[0].origin.line) if lengths else (None, None)
            raise OutOfMemory(
                f"{what} does not fit into memory: {reason}",
                file=file,
                line=line,
                fix="close other programs and run `loratune resume`, or train again with a smaller data.max_length, "
                "a larger train.recompute, or model.dtype: bfloat16",
            )
        # From the micro-batch that failed, not from the budget, which it may have been far below.
        tokens = sum(lengths)
        if self._shared:
            tokens = num_distinct([sequence.input_ids for example in self._current for sequence in example.sequences])
        self.tokens = min(self.tokens, tokens) // 2
        self._events.emit_local(
            "out_of_memory",
            f"out of memory in a micro-batch of {tokens:,} tokens; the step is repeated with micro-batches of at "
            f"most {self.tokens:,} tokens, and so are all later ones",
            token_budget=self.tokens,
        )


def random_state() -> dict[str, torch.Tensor]:
    """Return the RNG state of every torch device; a forward pass uses no other. Also saved in checkpoints."""
    states = {"cpu": torch.get_rng_state()}
    states.update({f"cuda{i:03d}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    """Restore torch's generators to what `random_state` returned."""
    torch.set_rng_state(states["cpu"])
    gpus = [states[name] for name in sorted(states) if name.startswith("cuda")]
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])
