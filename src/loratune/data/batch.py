"""Examples → the tensors of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loratune.data.examples import AnswersExample, Example, JudgedExample, LabeledExample
from loratune.data.rows.row import Origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.shared_prefixes import Distinct


FILLER = Example(
    input_ids=np.zeros(2, dtype=np.int32), supervised=np.array([False, True]), origin=Origin(file="filler", line=0)
)
"""The example of a micro-batch whose loss is multiplied by zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Several examples laid end to end, without padding. T tokens, E sequences, S supervised tokens.

    An example is one sequence, a pair of answers is two.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], restarting at 0 with each sequence.
        boundaries: int32 [E + 1]; sequence e occupies tokens boundaries[e] to boundaries[e + 1] - 1.
        host_boundaries: The same, which stay on the host: reading them there does not wait for the device.
        max_length: Tokens of the longest sequence.
        tree: int32 [2, segments + 1] on the host where sequences share tokens (`shared_prefixes`): the boundaries of
            segments in place of sequences, and the segment before each, -1 for none. Else None.
        distinct: The different ones of the predictions, where several sequences share a position and what comes next.
        predictors: int64 [S]; the positions whose output predicts a supervised token.
        targets: int64 [S]; these supervised tokens.
        labels: int64 [E]; the classes of labeled examples, or 1 for good and 0 for bad answers; else None.
        token_types: int64 [1, T]; which text of a pair each token belongs to, if the tokenizer says so, else None.
        answer_tokens: Supervised tokens of each sequence of preferences, E numbers; None for other examples.
        reference: float64 [E]; log p of each of these answers under the reference, None if there is none.
        rows: int32 [T]; each token's number for dropout and noise (`kernels.dropout.row_numbers`), None outside steps.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    boundaries: torch.Tensor
    host_boundaries: torch.Tensor
    max_length: int
    predictors: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor | None = None
    token_types: torch.Tensor | None = None
    answer_tokens: tuple[int, ...] | None = None
    reference: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    tree: torch.Tensor | None = None
    distinct: Distinct | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_supervised_tokens(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on another device. The host does not wait for the copies."""

        def moved(values: torch.Tensor) -> torch.Tensor:
            # From memory that may be paged out, the host would wait for its part of the copy.
            values = values.pin_memory() if device.type == "cuda" else values
            return values.to(device, non_blocking=True)

        return MicroBatch(
            input_ids=moved(self.input_ids),
            position_ids=moved(self.position_ids),
            boundaries=moved(self.boundaries),
            host_boundaries=self.host_boundaries,
            max_length=self.max_length,
            predictors=moved(self.predictors),
            targets=moved(self.targets),
            labels=None if self.labels is None else moved(self.labels),
            token_types=None if self.token_types is None else moved(self.token_types),
            answer_tokens=self.answer_tokens,
            reference=None if self.reference is None else moved(self.reference.to(float_type(device))),
            rows=None if self.rows is None else moved(self.rows),
            tree=self.tree,
            distinct=None if self.distinct is None else type(self.distinct)(*map(moved, self.distinct)),
        )


def float_type(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device, in which log-probabilities of whole answers are added up."""
    return torch.float32 if device.type == "mps" else torch.float64


def num_supervised(example: Example) -> int:
    """Count the trained tokens of an example; 1 for a labeled example, its label."""
    if isinstance(example, LabeledExample):
        return 1
    return int(example.supervised[1:].sum())  # nothing predicts the first token


def num_terms(example: Example) -> int:
    """Count the terms of an example's loss: 1 for a preference, else its supervised tokens."""
    return 1 if isinstance(example, AnswersExample) else num_supervised(example)


def collate(examples: Sequence[Example]) -> MicroBatch:
    """Lay examples end to end in one micro-batch.

    >>> # two examples [a b c] and [x y]; b, c and y are supervised
    >>> # input_ids    a b c x y      position_ids  0 1 2 0 1      boundaries  0 3 5
    >>> # predictors   0 1 3          targets       b c y
    """
    lengths = [len(sequence.input_ids) for example in examples for sequence in example.sequences]
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    supervised = np.concatenate([example.supervised for example in examples])
    supervised[boundaries[:-1]] = False
    targets_at = np.flatnonzero(supervised)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]))[None],
        boundaries=torch.from_numpy(boundaries),
        host_boundaries=torch.from_numpy(boundaries),
        max_length=max(lengths),
        predictors=torch.from_numpy(targets_at - 1),
        targets=torch.from_numpy(input_ids[targets_at]),
        **_classes(examples),
        **_answers(examples),
    )


def _classes(examples: Sequence[Example]) -> dict[str, Any]:
    """Return the labels and token types of labeled examples and of judged answers."""
    labeled = [example for example in examples if isinstance(example, LabeledExample | JudgedExample)]
    if not labeled:
        return {}
    found: dict[str, Any] = {"labels": torch.tensor([example.label for example in labeled])}
    types = [example.token_types for example in labeled if example.token_types is not None]
    if len(types) == len(labeled):
        found["token_types"] = torch.from_numpy(np.concatenate(types).astype(np.int64))[None]
    return found


def _answers(examples: Sequence[Example]) -> dict[str, Any]:
    """Return what losses of preferences need: the lengths of the answers, and their log p under the reference."""
    given = [example for example in examples if isinstance(example, AnswersExample)]
    if not given:
        return {}
    assert len(given) == len(examples), "preferences and other examples in one micro-batch"
    found: dict[str, Any] = {
        "answer_tokens": tuple(int(part.supervised[1:].sum()) for each in given for part in each.sequences)
    }
    reference = [each.reference for each in given if each.reference is not None]
    if len(reference) == len(given):
        found["reference"] = torch.tensor(reference, dtype=torch.float64).flatten()
    return found
