"""The training loss of each source: the sum over its supervised tokens of the loss that the step has summed anyway.

Nothing of a step waits for it: sums stay on the device beside the step's loss, travel between processes with it, and are read
together with it. With one source there is nothing of this.

Shapes: S supervised tokens of a micro-batch, G sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loratune.data.batch import num_supervised
from loratune.data.examples import Example


@dataclass(frozen=True, slots=True)
class SourceTally:
    """The losses of a micro-batch, and whose they are.

    Attributes:
        each_S: float32, to be filled with the loss of each supervised token.
        numbers_S: int64, the number of its source.
        num_sources: G.
    """

    each_S: torch.Tensor  # noqa: N815 - a shape
    numbers_S: torch.Tensor  # noqa: N815
    num_sources: int

    def sums(self) -> torch.Tensor:
        """Of each source, float32 [G]. Not by `index_add_`, whose order of adding is nobody's on a GPU."""
        sources_G1 = torch.arange(self.num_sources, device=self.numbers_S.device)[:, None]
        return torch.where(self.numbers_S == sources_G1, self.each_S, 0.0).sum(1)


class PerSourceLoss:
    """The sources of the training data.

    Args:
        of_file: File → the source that its examples are of; empty where there is one source.
    """

    def __init__(self, of_file: Mapping[str, str]) -> None:
        self.names = tuple(dict.fromkeys(of_file.values()))
        self._numbers = {file: self.names.index(name) for file, name in of_file.items()}

    def __len__(self) -> int:
        return len(self.names)

    def count(self, examples: Iterable[Example]) -> list[int]:
        """Supervised tokens of each source."""
        counts = [0] * len(self)
        for example in examples if self.names else ():
            counts[self._numbers[example.origin.file]] += num_supervised(example)
        return counts

    def tally(self, examples: Sequence[Example], device: torch.device) -> SourceTally | None:
        """For the losses of a micro-batch of these examples; None where there is nothing to tell apart."""
        if not self.names or not examples:
            return None
        numbers = np.repeat(
            [self._numbers[example.origin.file] for example in examples], [num_supervised(e) for e in examples]
        )
        # sent before the forward is under way: a copy that is asked for later waits for it
        numbers_S = torch.from_numpy(numbers).to(device, non_blocking=True)
        return SourceTally(torch.empty(len(numbers), device=device), numbers_S, len(self))

    def sums(self, examples: Iterable[Example], losses: Iterable[float]) -> list[float]:
        """Of each source, from the losses of whole examples."""
        sums = [0.0] * len(self)
        for example, loss in zip(examples, losses, strict=True):
            sums[self._numbers[example.origin.file]] += loss
        return sums

    def means(self, sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
        """Source → its loss, of those that a step has supervised tokens of."""
        found = zip(self.names, sums, counts, strict=True)
        return {name: total / count for name, total, count in found if count}
