"""The verdict on a run in one sentence: whether the fine-tuned model is better than the base, by how much, what to try.

The terminal, the report page and `loratune runs` say it in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loratune.reporting.units import as_difference, as_interval, as_measure, is_graded, measure_in_words
from loratune.run.errors import plural

if TYPE_CHECKING:
    from loratune.run.records.evaluation import EvaluationRecord

Outcome = Literal["better", "not better", "worse"]

_LOWER_IS_BETTER = ("nll", "perplexity")
_TRY: dict[Outcome, str] = {
    "better": "",
    "not better": "try more epochs (train.epochs, or train.max_steps), a higher train.learning_rate, or more data",
    "worse": "try fewer epochs (train.epochs, or train.max_steps) or a lower train.learning_rate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the evaluation says.

    Attributes:
        outcome: `better` or `worse` if the interval of the difference lies on one side of zero.
        sentence: The outcome with its numbers, and what to try if it is not better.
    """

    outcome: Outcome
    sentence: str


_PREFERENCES = (("pair_accuracy", "pair_margin"), ("label_margin", "label_margin"))
"""Measures of what preferences teach, each with one that moves where it cannot."""

_KEEPS = {"kto": ("good", "preference.desirable_weight")}
"""Loss → its word for the better answers, and the setting that keeps them likely."""


def verdict_on(record: EvaluationRecord) -> Verdict:
    """Return the verdict by the run's metric; without one, by the held-out loss, or by the pairs of preferences."""
    learned, finer = next((names for names in _PREFERENCES if names[0] in record.tuned), ("nll", "nll"))
    name = record.metric if record.metric in record.tuned else learned
    outcome = _outcome(record, name)
    than = " than where it began" if record.before == "start" else ""
    words = f"{outcome}{than}: {_numbers(record, name)}"
    if name != finer and outcome != "better" and _outcome(record, finer) == "better":
        words += f"; but the {_numbers(record, finer, interval=False)}"
    words += _fallen(record)
    advice = f"; {_TRY[outcome]}" if _TRY[outcome] else ""
    return Verdict(outcome=outcome, sentence=f"{words}{advice}")


def _fallen(record: EvaluationRecord) -> str:
    """Say if the chosen, or good, answers became less likely, by more than the interval.

    Where two answers differ in a few tokens, DPO may lower both of them (Pal et al. 2024, arXiv 2402.13228).
    """
    difference = record.difference["nll"]
    if record.preference is None or difference.low is None or difference.low <= 0:
        return ""
    better, setting = _KEEPS.get(record.preference.loss, ("chosen", "preference.sft_weight"))
    return (
        f"; but the {better} answers became less likely, by {difference.value:.3g} nats per token: raise "
        f"{setting}, or lower train.learning_rate"
    )


def _outcome(record: EvaluationRecord, name: str) -> Outcome:
    difference = record.difference[name]
    low = difference.value if difference.low is None else difference.low
    high = difference.value if difference.high is None else difference.high
    if name in _LOWER_IS_BETTER:
        low, high = -high, -low
    return "better" if low > 0 else "worse" if high < 0 else "not better"


def _numbers(record: EvaluationRecord, name: str, *, interval: bool = True) -> str:
    """Return `JSON correct 2.0% → 82.0%, +70.0 to +88.0 points (100 answers)`."""
    words = f"{measure_in_words(name)} {as_measure(name, record.base[name])} → {as_measure(name, record.tuned[name])}"
    if not interval:
        return words
    difference = record.difference[name]
    ends = as_interval(name, difference) or as_difference(name, difference.value)
    if "points" in as_difference(name, 0.0):
        ends = f"{ends.removesuffix(' points')} points"
    unit = "answer" if name == record.metric and (is_graded(name) or record.confusion is None) else "example"
    number = len(record.items) if unit == "answer" else record.num_examples
    level = f"{record.interval.level:.0%} interval"
    return f"{words}, {ends} ({level}; {plural(number, f'held-out {unit}')})"
