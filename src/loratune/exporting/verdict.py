"""From what was measured to a verdict: is an export the model that was trained?

`different`   something is not the trained model's: a prompt's tokens, a stop token, a setting, a tensor; or the outputs
              are further from training's than rounding explains.
`same`        nothing is different, and the proof could have failed: the base without the adapter would not have passed
              it. Either the outputs show that, since they are nearer to training's than the base's are, or the weights
              settle it, since they hold the update to within a tenth.
`undecided`   nothing is different, and the base without the adapter would have passed, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from loratune.run.directory import Record

Verdict = Literal["same", "different", "undecided"]

KEPT_EXACTLY = 0.1
"""The largest relative error of an update that counts as written exactly."""
RIGHT_FLIPS = 0.01
"""The share of decided positions at which a right export's likeliest token may differ."""
SURPRISE = 1e-3
"""The probability below which a number of differing tokens is no accident."""
FEW_POSITIONS = 20
"""Fewer positions decide nothing by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that a certificate weighs.

    Attributes:
        template: The comparison of prompts.
        missing_stops: The stop tokens that the target lacks and must have.
        settings: Settings that differ from the base's, in words.
        distributions: The comparison of distributions.
        limit: The largest mean KL divergence that rounding and arithmetic explain, in nats.
        rounding_known: Whether it is known how the target's weights were rounded.
        weights: The proof by weights; None where there is none.
        way_out: What the user can do where rounding loses the update.
    """

    template: Record
    missing_stops: list[int]
    settings: list[str]
    distributions: Record
    limit: float
    rounding_known: bool
    weights: Record | None
    way_out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A verdict and its reasons.

    Attributes:
        verdict: `same`, `different` or `undecided`.
        complaints: What differs; empty unless the verdict is `different`.
        reason: What the verdict rests on, or why there is none, in words.
        fix: What the user can do; empty for `same`.
    """

    verdict: Verdict
    complaints: list[str]
    reason: str
    fix: str


def decide(evidence: Evidence) -> Decision:
    """Return the verdict on an export."""
    complaints = _complaints(evidence)
    if complaints:
        return Decision(
            verdict="different",
            complaints=[what for what, _ in complaints],
            reason="; ".join(what for what, _ in complaints),
            fix="; ".join(dict.fromkeys(fix for _, fix in complaints)),
        )
    found, weights = evidence.distributions, evidence.weights
    base_kl, positions = found["base_kl"], found["num_positions"]
    near = found["mean_kl"] <= evidence.limit
    if near and base_kl > evidence.limit and (weights is not None or positions >= FEW_POSITIONS):
        reason = (
            f"its mean KL divergence from the trained model is {found['mean_kl']:.2g} nats; the base's is {base_kl:.2g}"
        )
        return Decision(verdict="same", complaints=[], reason=reason, fix="")
    if near and weights is not None and weights["relative_error"] <= KEPT_EXACTLY:
        reason = f"its weights hold the trained update to {weights['relative_error']:.2g} of its size"
        return Decision(verdict="same", complaints=[], reason=reason, fix="")
    return _undecided(evidence)


def allowed_flips(num_decided: int, num_flipped: int) -> int:
    """Return how many likeliest tokens may differ by chance, from a binomial bound.

    Args:
        num_decided: Positions where the likeliest token leads clearly.
        num_flipped: Those of them at which it differs in the trained model itself, rounded as the export is.
    """
    rate = max(RIGHT_FLIPS, (num_flipped + 1) / (num_decided + 2))
    below = 0.0
    for flips in range(num_decided + 1):
        below += math.comb(num_decided, flips) * rate**flips * (1 - rate) ** (num_decided - flips)
        if 1 - below < SURPRISE:
            return flips
    return num_decided


def _complaints(evidence: Evidence) -> list[tuple[str, str]]:
    """Return what differs, each with what the user can do about it."""
    complaints: list[tuple[str, str]] = []
    template, found = evidence.template, evidence.distributions
    other = template["num_prompts"] - template["same_token_ids"]
    if other:
        complaints.append(
            (
                f"{other} of {template['num_prompts']} prompts have different token ids: "
                f"{template['first_difference']}",
                "restore the tokenizer and the chat template that the run's adapter folder was written with",
            )
        )
    if evidence.missing_stops:
        complaints.append(
            (
                f"answers do not end at the tokens {evidence.missing_stops}",
                "add these to eos_token_id in generation_config.json",
            )
        )
    complaints += [(text, "use the base's own configuration") for text in evidence.settings]
    if evidence.weights is not None:
        complaints += zip(evidence.weights["problems"], evidence.weights["fixes"], strict=True)
    if found["mean_kl"] is None:
        complaints.append(("its logits are not finite", "another --dtype: float16 overflows where bfloat16 does not"))
    elif not complaints and evidence.rounding_known:
        complaints += _far(evidence)
    return complaints


def _far(evidence: Evidence) -> list[tuple[str, str]]:
    """Return in which way the outputs differ by more than rounding explains; for an export that is right otherwise."""
    found, kl = evidence.distributions, evidence.distributions["mean_kl"]
    fix = (
        "its weights and settings are right, but the program that read it back computes something else: use "
        "`loratune merge` or PEFT, and report this as a bug of loratune"
        if evidence.weights is not None
        else "the adapter on its base, loaded by PEFT; if loratune wrote this export, report this as a bug of loratune"
    )
    if kl > evidence.limit:
        return [(f"the mean KL divergence is {kl:.2g} nats, more than {evidence.limit:.2g}, {_base(found)}", fix)]
    flipped, decided = found["num_flipped"], found["num_decided"]
    if flipped > found["num_allowed"]:
        return [(f"the likeliest token differs at {flipped} of {decided} positions where it leads clearly", fix)]
    return []


def _base(found: Record) -> str:
    return f"and {found['base_kl']:.2g} for the base without the adapter"


def _undecided(evidence: Evidence) -> Decision:
    found, weights = evidence.distributions, evidence.weights
    if not evidence.rounding_known and found["mean_kl"] > evidence.limit:
        unknown = "how its weights were rounded is unknown"
        fix = "certify a file that `loratune export` wrote, before it is rounded further"
        if weights is not None:
            unknown, fix = "its weights are rounded too coarsely to show the update", evidence.way_out
        reason = (
            f"its mean KL divergence from the trained model is {found['mean_kl']:.2g} nats, the base's "
            f"{found['base_kl']:.2g}, and {unknown}"
        )
        return Decision(verdict="undecided", complaints=[], reason=reason, fix=fix)
    longer = "train longer, or at a higher learning rate"
    if weights is None and found["base_kl"] > evidence.limit:
        reason = f"only {found['num_positions']} positions could be compared, fewer than {FEW_POSITIONS}"
        return Decision(verdict="undecided", complaints=[], reason=reason, fix="compare on more rows: data.eval")
    reason = (
        f"training moved the model by {found['base_kl']:.2g} nats, no further than rounding and arithmetic may "
        f"({evidence.limit:.2g}), so the base without the adapter would pass, too"
    )
    if weights is None:
        return Decision(verdict="undecided", complaints=[], reason=reason, fix=longer)
    reason = (
        f"rounding to {' and '.join(weights['types'])} left {weights['kept']:.0%} of the update, with an error of "
        f"{weights['relative_error']:.2g} times its size; {reason}"
    )
    return Decision(verdict="undecided", complaints=[], reason=reason, fix=f"{evidence.way_out}, or {longer}")
