"""The data of a run, as every later stage receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from loratune.data.examples import Example
    from loratune.data.prompts import Prompt
    from loratune.data.rows.conversation import Conversation
    from loratune.data.rows.row import Rejected


@runtime_checkable
class Stream(Protocol):
    """Training examples made on demand, or the reason why a row is not one; see `loratune.data.stream`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example | Rejected: ...

    @property
    def contents(self) -> dict[str, Any]:
        """Fingerprints of all rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The data of a run.

    Attributes:
        train: Verified training examples, in the order of the sources; of streamed data, those of a random sample.
        eval: Verified held-out examples; empty if `data.eval` is `none`.
        eval_conversations: The conversation of each held-out example; of pairs that with the chosen answer, of judged
            answers those that are good.
        report: The data report: what was read, what it became, and what was left out, as JSON.
        cached: Whether all of it came from the cache.
        stream: All training examples, if `train` is only a sample.
        prompts: The held-out prompts that base and fine-tuned model answer; empty without a metric.
        forgetting: The examples of `evaluate.forgetting`; empty without it.
        shared_fraction: Fraction of the training tokens that do not go through the model, because others of their step
            stand for them (`train.share_prefixes`).
    """

    train: list[Example]
    eval: list[Example]
    eval_conversations: list[Conversation]
    report: dict[str, Any]
    cached: bool = False
    stream: Stream | None = None
    prompts: tuple[Prompt, ...] = ()
    forgetting: tuple[Example, ...] = ()
    shared_fraction: float = 0.0

    @property
    def num_examples(self) -> int:
        """Number of training examples; of streamed data, of rows."""
        return len(self.train if self.stream is None else self.stream)

    @property
    def scale(self) -> float:
        """Number of training examples per example in `train`."""
        return self.num_examples / len(self.train)
