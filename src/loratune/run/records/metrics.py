"""metrics.jsonl: one line per optimizer step, evaluation or event."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from loratune.run.records.base import Part, Place, RejectedRow


class StepLine(Part):
    """An optimizer step."""

    step: int
    """Optimizer step, counted from 1."""
    time: float
    """Seconds since 1970-01-01 UTC."""
    epoch: float
    """Epochs completed."""
    loss: float
    """Mean negative log-likelihood per trained token (per text for a classifier), in nats."""
    loss_by_source: dict[str, float] | None = None
    """Several sources only: source → its loss, in nats."""
    learning_rate: float
    """Learning rate of the step."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    num_tokens: int
    """Tokens of the step."""
    num_supervised_tokens: int
    """Trained tokens of the step."""
    num_processed_tokens: int | None = None
    """Shared prefixes only (`train.share_prefixes`): tokens that went through the model, each shared one once."""
    tokens_per_second: float
    """Speed of the step, in tokens per second."""
    peak_bytes: int
    """Peak memory so far, in bytes."""


class EvaluationLine(Part):
    """An evaluation during training."""

    step: int
    """Optimizer step after which it took place."""
    epoch: float
    """Epochs completed."""
    eval_nll: float
    """Held-out loss: mean negative log-likelihood per trained token (per text for a classifier), in nats."""
    seconds: float
    """Duration, in seconds."""
    eval_nll_by_source: dict[str, float] | None = None
    """Several sources only: source → held-out loss, in nats."""


class SuspectExample(Place):
    """An example of a step that went wrong."""

    loss: float | str
    """Its loss in nats; `nan` or `inf` as text."""
    text: str
    """Its text, shortened."""


class SampleAnswer(Part):
    """A held-out prompt that was answered during training."""

    question: str
    """The prompt, as people read it."""
    reference: str
    """The first reference answer."""
    text: str
    """The model's answer."""
    stopped: bool
    """Whether it ended with a stop token, before the token limit."""


class EventLine(Part):
    """Something out of the ordinary that happened."""

    step: int
    """Optimizer step in which it happened."""
    time: float
    """Seconds since 1970-01-01 UTC."""
    event: str
    """Kind: `out_of_memory`, `skipped`, `left_out`, `spike`, `evaluation_failed`, `tracker_failed`, `early_stopping`,
    `smaller_answer_batches`, `unreached`, `samples`, `samples_failed`."""
    message: str
    """What happened, in words."""
    token_budget: int | None = None
    """`out_of_memory` only: size of micro-batches from then on, in tokens."""
    examples: tuple[SuspectExample, ...] | None = None
    """`skipped` and `spike` only: the examples with the worst losses."""
    rows: tuple[RejectedRow, ...] | None = None
    """`left_out` only: streamed rows that are not trained on."""
    value: float | None = None
    """`spike` only: the loss, in nats."""
    median: float | None = None
    """`spike` only: median loss of the preceding steps, in nats."""
    modules: tuple[str, ...] | None = None
    """`unreached` only: trained modules, and experts of stacks, that got no gradient in the first step."""
    answers: tuple[SampleAnswer, ...] | None = None
    """`samples` only: the answers of the adapter as it was after the step."""
    seconds: float | None = None
    """`samples` only: duration, in seconds."""
    lowest_at: int | None = None
    """`early_stopping` only: step with the lowest held-out loss."""


def _kind(line: Any) -> str:
    """Return the tag of a line by the field that only its kind has."""
    fields = line if isinstance(line, dict) else getattr(line, "__dict__", {})
    return "event" if "event" in fields else "evaluation" if "eval_nll" in fields else "step"


MetricsLine = Annotated[
    Annotated[StepLine, Tag("step")]
    | Annotated[EvaluationLine, Tag("evaluation")]
    | Annotated[EventLine, Tag("event")],
    Discriminator(_kind),
]
"""A line of metrics.jsonl."""


@cache
def _adapter() -> TypeAdapter[StepLine | EvaluationLine | EventLine]:
    return TypeAdapter(MetricsLine)


def parse_metrics_line(line: str, *, lenient: bool = False) -> StepLine | EvaluationLine | EventLine:
    """Return the record of a line.

    Args:
        line: The line, without its end.
        lenient: Whether fields that this version does not know are ignored.

    Raises:
        ValidationError: The line is none.
    """
    return _adapter().validate_json(line, extra="ignore" if lenient else None)
