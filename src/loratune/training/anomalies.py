"""Numbers that should not be: a loss or a gradient that is not finite, and a loss that leaps.

A step whose loss or gradient is NaN or infinite is never applied. `train.on_bad_step` decides whether the run ends there, or
goes on without the step, at most `train.max_skipped_steps` times.

A loss is a spike when it lies above the median of the 50 steps before it by more than the median itself and by more than
8 robust standard deviations (1.4826 times the median distance from the median; Rousseeuw & Croux 1993). It is a warning.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratune.data.examples import Example
from loratune.recipe.recipe import TrainSection
from loratune.run import processes
from loratune.run.directory import Record
from loratune.run.errors import RunError
from loratune.training.event_log import EventLog, History
from loratune.training.held_out_loss import loss_of_each
from loratune.training.loss import SupervisedLoss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 50
"""Steps whose losses a new one is compared with."""

LEAST = 20
"""Steps before which nothing is called a spike."""

_DEVIATIONS = 8
_MOST_EXAMPLES = 5
_TEXT = 240
"""Characters of an example's text that are shown."""


class AnomalyGuard:
    """Looks at the loss and the gradient norm of each step, which are known anyway.

    Args:
        train: The recipe's policy.
        loss: Finds the examples that did it, one by one, when something is wrong.
        tokenizer: Turns them into text.
        events: Where it is told.
        history: Of the steps before.
    """

    def __init__(
        self,
        train: TrainSection,
        loss: SupervisedLoss,
        tokenizer: PreTrainedTokenizerBase,
        events: EventLog,
        history: History,
    ) -> None:
        self._train, self._loss, self._tokenizer, self._events = train, loss, tokenizer, events
        self._losses = deque(history.losses[-WINDOW:], maxlen=WINDOW)
        self._num_skipped = history.num_skipped
        self._in_spike = False

    def check(self, name: str, value: float, examples: Sequence[Example]) -> bool:
        """Whether a number is finite, so that the step may be applied.

        Raises:
            RunError: It is not, and the recipe says to stop, or too many steps were skipped.
        """
        if math.isfinite(value):
            return True
        suspects, num_examples = self._suspects(examples)
        problem = f"the {name} of step {self._events.step} is {value}\n{_in_words(suspects, num_examples)}"
        if self._train.on_bad_step == "error":
            raise RunError(
                f"{problem}\n  the step is not applied; checkpoints written before are intact",
                fix="look at the examples; lower train.learning_rate, set model.dtype: float32, or train.on_bad_step: skip",
            )
        self._num_skipped += 1
        if self._num_skipped > self._train.max_skipped_steps:
            raise RunError(
                f"{problem}\n  {self._num_skipped} steps could not be applied, train.max_skipped_steps is "
                f"{self._train.max_skipped_steps}",
                fix="lower train.learning_rate, or set model.dtype: float32",
            )
        self._events.emit("skipped", f"{problem}\n  the step is skipped", examples=suspects)
        return False

    def observe(self, loss: float, examples: Sequence[Example]) -> None:
        """Warn when a loss leaps; of steps in a row that do, the first is told, and all are written down."""
        if is_spike(loss, self._losses):
            median = statistics.median(self._losses)
            suspects, num_examples = ([], 0) if self._in_spike else self._suspects(examples)
            self._events.emit(
                "spike",
                f"the loss of step {self._events.step} leaps to {loss:.4g}, the median of {len(self._losses)} steps before is "
                f"{median:.4g}\n{_in_words(suspects, num_examples)}",
                told=not self._in_spike,
                value=loss,
                median=median,
                examples=suspects,
            )
            self._in_spike = True
        else:
            self._in_spike = False
        self._losses.append(loss)

    def _suspects(self, examples: Sequence[Example]) -> tuple[list[Record], int]:
        """The examples of the step with the worst losses, the not finite ones first, and how many it has in all processes."""
        losses = loss_of_each(self._loss, examples)
        worst = sorted(range(len(examples)), key=lambda i: _badness(losses[i]))[:_MOST_EXAMPLES]
        mine = [
            {
                "file": examples[i].origin.file,
                "line": examples[i].origin.line,
                "loss": losses[i] if math.isfinite(losses[i]) else str(losses[i]),
                "text": _shortened(str(self._tokenizer.decode(examples[i].input_ids.tolist()))),
            }
            for i in worst
        ]
        everybodys = processes.gather((mine, len(examples)))
        suspects = sorted((item for items, _ in everybodys for item in items), key=lambda item: _badness(item["loss"]))
        return suspects[:_MOST_EXAMPLES], sum(number for _, number in everybodys)


def _badness(loss: float | str) -> tuple[bool, float]:
    """By this the worst losses come first; equal ones stay in the order of the step."""
    finite = math.isfinite(float(loss))
    return finite, -float(loss) if finite else 0.0


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss leaps out of those of the steps before it; see the head of this file."""
    if len(before) < LEAST:
        return False
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
    return loss - median > max(median, _DEVIATIONS * deviation)


def _in_words(suspects: list[Record], num_examples: int) -> str:
    if not suspects:
        return ""
    lines = [f"  {item['file']}:{item['line']}  loss {_number(item['loss'])}  {item['text']!r}" for item in suspects]
    more = num_examples - len(suspects)
    return "\n".join([*lines, *([f"  and {more} more"] if more else [])])


def _number(loss: float | str) -> str:
    return loss if isinstance(loss, str) else f"{loss:.4g}"


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[: _TEXT // 2]} … {text[-_TEXT // 2 :]}"
