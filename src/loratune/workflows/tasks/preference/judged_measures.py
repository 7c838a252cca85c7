"""Measures of judged answers: how likely a model finds good and bad ones, implicit rewards, and lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from loratune.evaluation.record import LEVEL, paired_bootstrap, side_before
from loratune.run.errors import plural
from loratune.workflows.tasks.preference.measures import (
    add_reward_rows,
    mean_length,
    mean_with_interval,
    own_lengths,
)
from loratune.workflows.tasks.preference.objective import beta_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from loratune.data.examples import JudgedExample
    from loratune.recipe.recipe import PreferenceSection
    from loratune.run.directory import Record
    from loratune.training.held_out_loss import Nll
    from loratune.workflows.tasks.preference.log_probs import LogProbs

NAMES = ("label_margin",)
"""Measures of judged answers, beside those of answers."""


def add_measures(
    record: Record,
    section: PreferenceSection,
    examples: Sequence[JudgedExample],
    *,
    base: LogProbs,
    tuned: LogProbs,
    reference: LogProbs | None,
) -> None:
    """Add to `evaluation.json` what base and fine-tuned model say of the held-out answers.

    Adds to `base`, `tuned` and `difference`: `label_margin`, the mean log p per token of the good answers minus that of
    the bad ones, in nats. `preference` has rewards and lengths, of good answers as `chosen` and bad ones as `rejected`.

    Args:
        record: The record, with `items`.
        section: The recipe's preference section.
        examples: The held-out answers, of both labels.
        base: Log-probabilities under the base model.
        tuned: Those under the fine-tuned model.
        reference: Those under the model as it was before training; None if that is lost.
    """
    good = np.array([example.label for example in examples], dtype=bool)
    lengths = np.array([int(example.supervised.sum()) for example in examples])
    margins = [_shares(values[:, 0] / lengths, good) for values in (base, tuned)]
    record["base"]["label_margin"], record["tuned"]["label_margin"] = (float(part.mean()) for part in margins)
    record["difference"]["label_margin"] = paired_bootstrap(*(part.tolist() for part in margins)).as_dict()
    record["preference"] = {
        "loss": section.loss,
        "beta": beta_of(section),
        "rewards": None if reference is None else _rewards(beta_of(section) * (tuned - reference)[:, 0], good),
        "lengths": {
            "chosen": float(lengths[good].mean()),
            "rejected": float(lengths[~good].mean()),
            "base": mean_length(record["items"], "base"),
            "tuned": mean_length(record["items"], "tuned"),
            "num_chosen_shorter": 0,
            "base_accuracy_where_shorter": None,
            "tuned_accuracy_where_shorter": None,
        },
    }


def good_nll(examples: Sequence[JudgedExample], values: LogProbs) -> Nll:
    """Return the loss of each good answer, in the form of `evaluate_nll`; a bad one counts no tokens."""
    return [
        (-logp * example.label, int(example.supervised.sum()) * example.label)
        for example, (logp,) in zip(examples, values.tolist(), strict=True)
    ]


def _shares(values: npt.NDArray[np.float64], good: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return numbers whose mean is the mean of good answers minus that of bad ones."""
    weights = np.where(good, 1 / good.sum(), -1 / (~good).sum())
    shares: npt.NDArray[np.float64] = len(values) * weights * values
    return shares


def _rewards(rewards: npt.NDArray[np.float64], good: npt.NDArray[np.bool_]) -> Record:
    """Describe the implicit rewards β·(log p - log p_ref), which are zero before training."""
    right = (np.sign(np.where(good, rewards, -rewards)) + 1) / 2
    return {
        "chosen": float(rewards[good].mean()),
        "rejected": float(rewards[~good].mean()),
        "margin": mean_with_interval(_shares(rewards, good)).as_dict(),
        "accuracy": mean_with_interval(right).as_dict(),
    }


def judged_table(record: Mapping[str, Any]) -> Table:
    """Return a table of the held-out answers: one row per measure, with the interval of the difference."""
    preference = record["preference"]
    lengths, rewards = preference["lengths"], preference["rewards"]
    table = Table(
        title=f"Held-out: {plural(record['num_examples'], 'answer')}",
        caption=f"good answers have {lengths['chosen']:.0f} tokens on average, bad ones "
        f"{lengths['rejected']:.0f}{own_lengths(lengths, side_before(record))}",
        caption_justify="left",
    )
    table.add_column("measure", overflow="fold")
    for column in (side_before(record), "fine-tuned", "difference", f"{LEVEL:.0%} interval"):
        table.add_column(column, justify="right")
    base, tuned, difference = (record[side]["label_margin"] for side in ("base", "tuned", "difference"))
    table.add_row(
        "log p per token, good minus bad, nats",
        f"{base:.4g}",
        f"{tuned:.4g}",
        f"{difference['value']:+.4g}",
        f"{difference['low']:+.4g} to {difference['high']:+.4g}",
    )
    if rewards is not None:
        add_reward_rows(table, rewards)
    return table
