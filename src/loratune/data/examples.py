"""An example: the tokens of one row, and which of them are trained, which class the row has, or which answers are
good."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from loratune.data.rows.row import Origin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One tokenized conversation."""

    input_ids: npt.NDArray[np.int32]
    """[T]"""
    supervised: npt.NDArray[np.bool_]
    """[T] Whether token t carries loss. It is predicted from the tokens before it, so token 0 never does."""
    origin: Origin

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The sequences that go through the model, which do not see each other."""
        return (self,)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswersExample(Example):
    """A prompt with its answers, whose likelihood as a whole decides the loss: one term, not one for each token."""

    reference: tuple[float, ...] | None = None
    """log p of each answer under the reference, in nats; None before they are computed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairExample(AnswersExample):
    """A conversation with a better and a worse answer: two sequences end to end, first the one with the better answer.

    As one example, a pair is never divided among steps, processes or micro-batches.
    """

    num_chosen: int
    """Tokens of the first sequence."""

    @classmethod
    def of(cls, chosen: Example, rejected: Example, origin: Origin) -> Self:
        """Join two sequences."""
        supervised = np.concatenate([chosen.supervised, rejected.supervised])
        supervised[[0, len(chosen.input_ids)]] = False  # nothing predicts the first token of a sequence
        return cls(
            input_ids=np.concatenate([chosen.input_ids, rejected.input_ids]),
            supervised=supervised,
            origin=origin,
            num_chosen=len(chosen.input_ids),
        )

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The conversation with the chosen answer, and that with the rejected one."""
        return tuple(
            Example(input_ids=self.input_ids[part], supervised=self.supervised[part], origin=self.origin)
            for part in (slice(None, self.num_chosen), slice(self.num_chosen, None))
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedExample(AnswersExample):
    """A conversation with one answer that was judged good or bad."""

    label: int
    """1: the answer is good, 0: it is bad."""
    token_types: ClassVar[None] = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabeledExample(Example):
    """One tokenized text and its class. Only the class is trained, none of the tokens."""

    label: int
    """Index of the class."""
    name: str
    """Name of the class."""
    token_types: npt.NDArray[np.int8] | None
    """[T] 0 and 1 for the two texts of a pair, if the tokenizer distinguishes them."""
    texts: tuple[str, ...]
    """The text, or the two texts of a pair."""


def labels_fingerprint(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of all classes or judgements, and token types; empty if there are none."""
    labeled = [example for example in examples if isinstance(example, LabeledExample | JudgedExample)]
    digest = hashlib.sha256()
    for example in labeled:
        types = b"" if example.token_types is None else example.token_types.tobytes()
        digest.update(example.label.to_bytes(4, "little") + len(types).to_bytes(8, "little") + types)
    return digest.hexdigest() if labeled else ""
