"""Measures of preference pairs: which answer a model finds likelier, implicit rewards, and the lengths of answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from loratune.evaluation.record import LEVEL, Interval, paired_bootstrap, side_before
from loratune.run.errors import plural
from loratune.workflows.tasks.preference.objective import beta_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from loratune.data.examples import PairExample
    from loratune.recipe.recipe import PreferenceSection
    from loratune.run.directory import Record
    from loratune.training.held_out_loss import Nll
    from loratune.workflows.tasks.preference.log_probs import LogProbs

MEASURES = ("pair_accuracy", "pair_accuracy_per_token", "pair_margin")
"""Measures of pairs, beside those of answers. A tie counts half."""


def add_pair_measures(
    record: Record,
    section: PreferenceSection,
    pairs: Sequence[PairExample],
    *,
    base: LogProbs,
    tuned: LogProbs,
    reference: LogProbs | None,
) -> None:
    """Add to `evaluation.json` what base and fine-tuned model say of the held-out pairs.

    Adds to `base`, `tuned` and `difference`: `pair_accuracy`, the share of pairs whose chosen answer has the higher
    log p; `pair_accuracy_per_token`, the same of log p per token, which does not favor short answers; `pair_margin`,
    the mean of log p(chosen) - log p(rejected), in nats. `preference` has rewards and lengths.

    Args:
        record: The record, with `items`.
        section: The recipe's preference section.
        pairs: The held-out pairs.
        base: Log-probabilities under the base model.
        tuned: Those under the fine-tuned model.
        reference: Those under the model as it was before training; None for losses without a reference.
    """
    lengths = np.array([[int(part.supervised.sum()) for part in pair.sequences] for pair in pairs])
    for name, base_values, tuned_values in (
        ("pair_accuracy", _wins(base), _wins(tuned)),
        ("pair_accuracy_per_token", _wins(base / lengths), _wins(tuned / lengths)),
        ("pair_margin", _margins(base), _margins(tuned)),
    ):
        record["base"][name], record["tuned"][name] = float(base_values.mean()), float(tuned_values.mean())
        record["difference"][name] = paired_bootstrap(base_values.tolist(), tuned_values.tolist()).as_dict()
    shorter = lengths[:, 0] < lengths[:, 1]
    record["preference"] = {
        "loss": section.loss,
        "beta": beta_of(section),
        "rewards": None if reference is None else _rewards(beta_of(section) * (tuned - reference)),
        "lengths": {
            "chosen": float(lengths[:, 0].mean()),
            "rejected": float(lengths[:, 1].mean()),
            "base": mean_length(record["items"], "base"),
            "tuned": mean_length(record["items"], "tuned"),
            "num_chosen_shorter": int(shorter.sum()),
            "base_accuracy_where_shorter": float(_wins(base)[shorter].mean()) if shorter.any() else None,
            "tuned_accuracy_where_shorter": float(_wins(tuned)[shorter].mean()) if shorter.any() else None,
        },
    }


def chosen_nll(pairs: Sequence[PairExample], values: LogProbs) -> Nll:
    """Return the loss of each chosen answer, in the form of `evaluate_nll`."""
    return [(-logp, int(p.sequences[0].supervised.sum())) for p, (logp, _) in zip(pairs, values.tolist(), strict=True)]


def _wins(values: LogProbs) -> npt.NDArray[np.float64]:
    return (np.sign(values[:, 0] - values[:, 1]) + 1) / 2


def _margins(values: LogProbs) -> npt.NDArray[np.float64]:
    margins: npt.NDArray[np.float64] = values[:, 0] - values[:, 1]
    return margins


def _rewards(rewards: LogProbs) -> Record:
    """Describe the implicit rewards β·(log p - log p_ref), which are zero before training."""
    return {
        "chosen": float(rewards[:, 0].mean()),
        "rejected": float(rewards[:, 1].mean()),
        "margin": mean_with_interval(_margins(rewards)).as_dict(),
        "accuracy": mean_with_interval(_wins(rewards)).as_dict(),
    }


def mean_with_interval(values: npt.NDArray[np.float64]) -> Interval:
    """Return the mean of items with its interval."""
    return paired_bootstrap([0.0] * len(values), values.tolist())


def mean_length(items: Sequence[Mapping[str, Any]], side: str) -> float | None:
    """Return the mean tokens of a model's own answers; None if it gave none."""
    return math.fsum(item[side]["num_tokens"] for item in items) / len(items) if items else None


def preference_table(record: Mapping[str, Any]) -> Table:
    """Return a table of the held-out pairs: one row per measure, with the interval of the difference."""
    preference = record["preference"]
    lengths, rewards = preference["lengths"], preference["rewards"]
    table = Table(
        title=f"Held-out: {plural(record['num_examples'], 'pair')}",
        caption=f"chosen answers have {lengths['chosen']:.0f} tokens on average, rejected ones "
        f"{lengths['rejected']:.0f}{own_lengths(lengths, side_before(record))}",
        caption_justify="left",
    )
    table.add_column("measure", overflow="fold")
    for column in (side_before(record), "fine-tuned", "difference", f"{LEVEL:.0%} interval"):
        table.add_column(column, justify="right")
    for name, words in (
        ("pair_accuracy", "chosen likelier"),
        ("pair_accuracy_per_token", "chosen likelier per token"),
    ):
        points = {end: 100 * value for end, value in record["difference"][name].items()}
        table.add_row(
            words,
            f"{record['base'][name]:.1%}",
            f"{record['tuned'][name]:.1%}",
            f"{points['value']:+.1f} points",
            f"{points['low']:+.1f} to {points['high']:+.1f}",
        )
    base, tuned, difference = (record[side]["pair_margin"] for side in ("base", "tuned", "difference"))
    interval = f"{difference['low']:+.4g} to {difference['high']:+.4g}"
    table.add_row("margin of log p, nats", f"{base:.4g}", f"{tuned:.4g}", f"{difference['value']:+.4g}", interval)
    if rewards is not None:
        add_reward_rows(table, rewards)
    return table


def add_reward_rows(table: Table, rewards: Mapping[str, Any]) -> None:
    """Add the rows of the implicit rewards."""
    margin, accuracy = rewards["margin"], rewards["accuracy"]
    interval = f"{margin['low']:+.4g} to {margin['high']:+.4g}"
    table.add_row("reward margin", "0", f"{margin['value']:.4g}", f"{margin['value']:+.4g}", interval)
    interval = f"{accuracy['low']:.1%} to {accuracy['high']:.1%}"
    table.add_row("reward accuracy", "", f"{accuracy['value']:.1%}", "", interval)


def own_lengths(lengths: Mapping[str, Any], before: str) -> str:
    """Describe the lengths of the models' own answers; "" if they gave none."""
    if lengths["base"] is None:
        return ""
    return f"; the models' own answers: {before} {lengths['base']:.0f}, fine-tuned {lengths['tuned']:.0f}"
