"""The training loss of each data source, from the losses of supervised tokens that the step computes anyway.

No step waits for it: the sums stay on the device next to the step's loss, are reduced over ranks with it and read
together with it. With a single source, nothing of this runs.

Shapes: S supervised tokens of a micro-batch, G sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from loratune.data.batch import num_terms

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from loratune.data.examples import Example


@dataclass(frozen=True, slots=True)
class SourceTally:
    """The losses of a micro-batch's supervised tokens, with the source of each.

    Attributes:
        each_S: float32, to be filled with the loss of each supervised token.
        numbers_S: int64, the index of its source.
        num_sources: G.
    """

    each_S: torch.Tensor  # noqa: N815 - a shape
    numbers_S: torch.Tensor  # noqa: N815
    num_sources: int

    def sums(self) -> torch.Tensor:
        """Return the summed loss of each source, float32 [G]."""
        # Not `index_add_`, which adds in no fixed order on a GPU.
        sources_G1 = torch.arange(self.num_sources, device=self.numbers_S.device)[:, None]
        return torch.where(self.numbers_S == sources_G1, self.each_S, 0.0).sum(1)


class PerSourceLoss:
    """The sources of the training data; of length 0 if there is only one.

    Args:
        of_file: File → the source of its examples; empty if there is only one source.
    """

    def __init__(self, of_file: Mapping[str, str]) -> None:
        self.names = tuple(dict.fromkeys(of_file.values()))
        self._numbers = {file: self.names.index(name) for file, name in of_file.items()}

    def __len__(self) -> int:
        return len(self.names)

    def count(self, examples: Iterable[Example]) -> list[int]:
        """Count the supervised tokens of each source."""
        counts = [0] * len(self)
        for example in examples if self.names else ():
            counts[self._numbers[example.origin.file]] += num_terms(example)
        return counts

    def tally(self, examples: Sequence[Example], device: torch.device) -> SourceTally | None:
        """Return an empty tally for a micro-batch of these examples; None if there is only one source."""
        if not self.names or not examples:
            return None
        numbers = np.repeat(
            [self._numbers[example.origin.file] for example in examples], [num_terms(e) for e in examples]
        )
        # Copied now: a copy to the GPU requested after the forward is queued would wait for it.
        numbers_S = torch.from_numpy(numbers).to(device, non_blocking=True)
        return SourceTally(torch.empty(len(numbers), device=device), numbers_S, len(self))

    def sums(self, examples: Iterable[Example], losses: Iterable[float]) -> list[float]:
        """Sum the losses of complete examples by source."""
        sums = [0.0] * len(self)
        for example, loss in zip(examples, losses, strict=True):
            sums[self._numbers[example.origin.file]] += loss
        return sums

    def means(self, sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
        """Return source → mean loss, for sources with supervised tokens in the step."""
        found = zip(self.names, sums, counts, strict=True)
        return {name: total / count for name, total, count in found if count}
