"""What was learned from preferences: rewards and lengths, below the measures of a run's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.reporting.blocks import Block, Paragraph, Table
from loratune.reporting.units import as_number
from loratune.run.errors import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.run.records.evaluation import EvaluationRecord, LengthsOfAnswers, PreferenceMeasures, Rewards

PAIR_MEASURES = ("pair_accuracy", "pair_accuracy_per_token", "pair_margin")
"""Measures of `evaluation.json` that compare the two answers of a pair."""

LABEL_MEASURES = ("label_margin",)
"""Measures of `evaluation.json` that compare good and bad answers to different prompts."""

_PAIR_TEXT = (
    "A pair is won where the model finds the chosen answer likelier than the rejected one; per token, since long "
    "answers are less likely than short ones. The margin is log p(chosen) - log p(rejected), in nats."
)
_JUDGED_TEXT = (
    "The margin is the mean log p per token of good answers minus that of bad ones, in nats. Good and bad answers have "
    "different prompts, so what counts is how it changes."
)
_SIDES = {"kto": ("good", "bad", "answers whose reward has the sign of their label")}
_PAIR_SIDES = ("chosen", "rejected", "pairs with a positive margin")
"""Words for both sides, and for the share that is right, by loss."""


def preference(record: EvaluationRecord) -> Iterator[Block]:
    """Build the paragraphs and tables of rewards and lengths."""
    found = record.preference
    if found is None:
        return
    yield Paragraph(text=_JUDGED_TEXT if found.loss in _SIDES else _PAIR_TEXT)
    if found.rewards is not None:
        yield _rewards(found, found.rewards)
    yield _lengths(found, record.model_before)
    if found.lengths.base_accuracy_where_shorter is not None:
        yield Paragraph(text=_where_shorter(found.lengths, record.model_before))


def _rewards(found: PreferenceMeasures, rewards: Rewards) -> Table:
    margin, accuracy = rewards.margin, rewards.accuracy
    better, worse, right = _SIDES.get(found.loss, _PAIR_SIDES)
    return Table(
        caption=f"Rewards: {found.beta:g} × (log p - log p before training), {found.loss}",
        columns=("measure", "fine-tuned", "interval"),
        rows=(
            (f"reward of {better} answers", as_number(rewards.chosen, "+"), ""),
            (f"reward of {worse} answers", as_number(rewards.rejected, "+"), ""),
            ("reward margin", as_number(margin.value, "+"), _interval(margin.low, margin.high)),
            (right, f"{accuracy.value:.1%}", _shares(accuracy.low, accuracy.high)),
        ),
        numeric=True,
    )


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{as_number(low, '+')} to {as_number(high, '+')}"


def _shares(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.1%} to {high:.1%}"


def _lengths(found: PreferenceMeasures, before: str) -> Table:
    lengths, (better, worse, _) = found.lengths, _SIDES.get(found.loss, _PAIR_SIDES)
    rows = [
        (f"{better} answers of the data", f"{lengths.chosen:,.1f}"),
        (f"{worse} answers of the data", f"{lengths.rejected:,.1f}"),
    ]
    if lengths.base is not None and lengths.tuned is not None:
        rows += [
            (f"own answers of {before}", f"{lengths.base:,.1f}"),
            ("own answers of the fine-tuned model", f"{lengths.tuned:,.1f}"),
        ]
    return Table(caption="Length of answers, tokens on average", columns=("", "tokens"), rows=tuple(rows), numeric=True)


def _where_shorter(lengths: LengthsOfAnswers, before: str) -> str:
    return (
        f"Where the chosen answer is the shorter one ({plural(lengths.num_chosen_shorter, 'pair')}), {before} "
        f"wins {lengths.base_accuracy_where_shorter:.1%} and the fine-tuned model "
        f"{lengths.tuned_accuracy_where_shorter:.1%}. If only long answers were learned, this would fall."
    )
