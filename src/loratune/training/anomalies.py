"""Guards against a loss or gradient norm that is not finite, and warnings of loss spikes.

A step whose loss or gradient norm is NaN or infinite is never applied. `train.on_bad_step` decides whether the run ends
there or skips the step, at most `train.max_skipped_steps` times.

A loss is a spike if it exceeds the median of the 50 steps before it by more than that median and by more than 8 robust
standard deviations (1.4826 times the median absolute deviation; Rousseeuw & Croux 1993). A spike is only a warning.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING

from loratune.run import processes
from loratune.run.errors import RunError
from loratune.training.held_out_loss import loss_of_each

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.recipe.recipe import TrainSection
    from loratune.run.directory import Record
    from loratune.training.event_log import EventLog, History
    from loratune.training.loss import SupervisedLoss

WINDOW = 50
"""Number of preceding steps that a loss is compared with."""

LEAST = 20
"""Number of preceding steps without which no loss counts as a spike."""

_DEVIATIONS = 8
_MAX_EXAMPLES = 5
_MAX_CHARACTERS = 240
"""Characters of an example's text that a message shows."""


class AnomalyGuard:
    """Checks the loss and the gradient norm of each step, which are known anyway.

    Args:
        train: The recipe's section, with the policy for bad steps.
        loss: Measures the step's examples one by one when something is wrong, to find the cause.
        tokenizer: Decodes these examples for the message.
        events: Where anomalies are reported.
        history: What is known of the steps before a resume.
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
        """Tell whether a number is finite, so that the step may be applied; report it otherwise.

        Raises:
            RunError: It is not finite, and the recipe says to stop, or too many steps were skipped.
        """
        if math.isfinite(value):
            return True
        suspects, num_examples = self._suspects(examples)
        problem = f"the {name} of step {self._events.step} is {value}\n{_in_words(suspects, num_examples)}"
        if self._train.on_bad_step == "error":
            raise RunError(
                f"{problem}\n  the step is not applied; earlier checkpoints are intact",
                fix="check these examples; lower train.learning_rate, set model.dtype: float32, or "
                "train.on_bad_step: skip",
            )
        self._num_skipped += 1
        if self._num_skipped > self._train.max_skipped_steps:
            raise RunError(
                f"{problem}\n  {self._num_skipped} steps could not be applied, but train.max_skipped_steps is "
                f"{self._train.max_skipped_steps}",
                fix="lower train.learning_rate, or set model.dtype: float32",
            )
        self._events.emit("skipped", f"{problem}\n  the step is skipped", examples=suspects)
        return False

    def observe(self, loss: float, examples: Sequence[Example]) -> None:
        """Record a loss spike; of several in a row, warn of the first only."""
        if is_spike(loss, self._losses):
            median = statistics.median(self._losses)
            suspects, num_examples = ([], 0) if self._in_spike else self._suspects(examples)
            self._events.emit(
                "spike",
                f"the loss of step {self._events.step} jumps to {loss:.4g}; the median of the {len(self._losses)} "
                f"steps before is {median:.4g}\n{_in_words(suspects, num_examples)}",
                warn=not self._in_spike,
                value=loss,
                median=median,
                examples=suspects,
            )
            self._in_spike = True
        else:
            self._in_spike = False
        self._losses.append(loss)

    def _suspects(self, examples: Sequence[Example]) -> tuple[list[Record], int]:
        """Return the step's examples with the worst losses, worst first, and the number of examples on all ranks."""
        losses = loss_of_each(self._loss, examples)
        worst = sorted(range(len(examples)), key=lambda i: _badness(losses[i]))[:_MAX_EXAMPLES]
        mine = [
            {
                "file": examples[i].origin.file,
                "line": examples[i].origin.line,
                "loss": losses[i] if math.isfinite(losses[i]) else str(losses[i]),
                "text": _shortened(str(self._tokenizer.decode(examples[i].input_ids.tolist()))),
            }
            for i in worst
        ]
        of_all_ranks = processes.gather((mine, len(examples)))
        suspects = sorted(
            (item for items, _ in of_all_ranks for item in items), key=lambda item: _badness(item["loss"])
        )
        return suspects[:_MAX_EXAMPLES], sum(number for _, number in of_all_ranks)


def _badness(loss: float | str) -> tuple[bool, float]:
    """Return a sort key that puts NaN and infinity first, then the highest losses."""
    finite = math.isfinite(float(loss))
    return finite, -float(loss) if finite else 0.0


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Tell whether a loss is a spike compared with the losses before it, by the rule at the top of this file."""
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
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} … {text[-half:]}"
