"""The certificate: evidence that an exported model is the one that was trained.

Three proofs, each of which can fail (`verdict` combines them):

- prompts, stop tokens and settings: the token ids of prompts, rendered by the target's own template and tokenized by
  its own tokenizer; the tokens that end an answer; the configuration of the model (`structure`).
- weights (`weights_proof`): written minus base against the trained update, tensor by tensor, where they can be read.
- distributions of the next token at positions of answers: KL(trained ‖ target) against two yardsticks at the same
  positions: KL(trained ‖ base), and KL(trained ‖ trained), the latter with weights rounded as the target's are, in
  training's own code. Arithmetic is float32 on both sides, since the rounding of 16-bit sums is not a property of an
  export.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from loratune.exporting.reference_outputs import ReferenceOutputs, divergence_from
from loratune.exporting.verdict import Decision, Evidence, allowed_flips, decide
from loratune.reporting.units import measure_in_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.exporting.weights_proof import NamedRounding
    from loratune.run.directory import Record

MORE_THAN_ROUNDING = 2.0
"""How many times the divergence of the rounded trained model a right export may have."""

MOST_UNPROVEN = 0.05
"""The largest share of the update's squared norm in matrices too coarse to tell whether they hold it, up to which a
file's own values may say what its quantization costs."""

NEARER_THAN_BASE = 1 / 16
"""How much nearer to the trained model than the base an export must be where its rounding is unknown: a quarter of the
update, since the divergence is quadratic in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far arithmetic alone may move the outputs of a correct export.

    Attributes:
        mean_kl: The mean KL(training ‖ target) that arithmetic explains, in nats.
        margin: The lead of the top token over the second, in nats, from which a position counts as decided.
        reason: Why the two may differ.
    """

    mean_kl: float
    margin: float
    reason: str


EXACT = Tolerance(mean_kl=1e-6, margin=0.01, reason="float32 arithmetic on both sides, summed in a different order")
ROUNDED = Tolerance(mean_kl=0.01, margin=0.25, reason="arithmetic in 16 bits on one side")
QUANTIZED = Tolerance(mean_kl=0.03, margin=0.5, reason="products of 8 bits or fewer on one side")


class Target(Protocol):
    """An export, loaded back by the code that will serve it, or by the closest that is installed."""

    checked_with: str
    """The name and version of that code."""

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        """Render and tokenize the prompt for the next answer with the target's own template and tokenizer."""
        ...

    def logits(self, input_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Return the logits that predict the token after each position: float32 [len(positions), V]."""
        ...

    def ends_with(self, token_id: int) -> bool:
        """Return whether this token ends an answer."""
        ...


Load = Callable[[ReferenceOutputs], Target]
"""Loads an export back; gets what will be compared, to size its context by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An export that was written, and how to prove it.

    Attributes:
        load: Loads it back.
        tolerance: How far arithmetic alone may move its outputs.
        rounding: How its weights are rounded; None where they are the base's, or where that is unknown.
        rounding_known: Whether `rounding` is all that happened to its weights.
        as_stored: Whether `rounding` gives the values in the file, which say nothing by themselves: weights must have
            been proven to be those of training, quantized.
        prove: Returns the proof by weights; None where there is none.
        settings: Returns the settings that differ from the base's, in words.
        way_out: What the user can do where rounding loses the update.
    """

    load: Load
    tolerance: Tolerance
    rounding: NamedRounding | None = None
    rounding_known: bool = True
    as_stored: bool = False
    prove: Callable[[], Record | None] = lambda: None
    settings: Callable[[], list[str]] = list
    way_out: str = "the adapter alone, without merging"


def certify(
    expected: ReferenceOutputs,
    target: Target,
    written: Written,
    *,
    stops_required: bool,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """Compare an export with training. Return the record `parity.json`, whose `verdict` gives the result.

    Args:
        expected: The outputs of training.
        target: The export, loaded back.
        written: How to prove it.
        stops_required: Whether the target itself must stop where training does. False for an adapter, which cannot
            change where its base stops.
        progress: Called after each example.
    """
    template = _compare_prompts(expected, target)
    weights = written.prove()
    known = written.rounding_known
    if written.as_stored:
        known = weights is not None and weights["unproven"] <= MOST_UNPROVEN
    distributions, limit = _compare_distributions(expected, target, written.tolerance, known, progress)
    missing = [token for token in expected.stop_token_ids if not target.ends_with(token)]
    decision = decide(
        Evidence(
            template=template,
            missing_stops=missing if stops_required else [],
            settings=written.settings(),
            distributions=distributions,
            limit=limit,
            rounding_known=known,
            weights=weights,
            way_out=written.way_out,
        )
    )
    decided, allowed = distributions["num_decided"], distributions.pop("num_allowed")
    return {
        **with_decision(decision),
        "checked_with": target.checked_with,
        "template": template,
        "stop_tokens": {"ids": list(expected.stop_token_ids), "missing": missing},
        "distributions": distributions,
        "weights": weights,
        "tolerance": {
            **asdict(written.tolerance),
            "mean_kl": limit,
            "top1": 1 - allowed / decided if decided else 0.0,
        },
        "compared_on": expected.compared_on,
        "loratune": importlib.metadata.version("loratune"),
    }


def with_decision(decision: Decision) -> Record:
    """Return the fields of a certificate that state its verdict."""
    return {
        "verdict": decision.verdict,
        "passed": decision.verdict == "same",
        "complaints": decision.complaints,
        "reason": decision.reason,
        "fix": decision.fix,
    }


def summary(certificate: Record) -> str:
    """Return the certificate in one line for people."""
    template, distributions = certificate["template"], certificate["distributions"]
    verdict = {"same": "same", "different": "NOT the same", "undecided": "UNDECIDED whether the same"}[
        certificate["verdict"]
    ]
    if certificate.get("compares") == "classes":
        return (
            f"verified with {certificate['checked_with']}: {verdict} classifier; same token ids for "
            f"{template['same_token_ids']} of {template['num_prompts']} texts, same class for "
            f"{distributions['top1_agreement']:.1%}, {_divergence(distributions)}"
        )
    compared = template.get("compared_by", "token ids")
    prompts = (
        f"verified with {certificate['checked_with']}: {verdict} model; same {compared} for "
        f"{template['same_token_ids']} of {template['num_prompts']} prompts, "
    )
    if certificate.get("served"):
        return f"{prompts}{_served(certificate['served'], distributions)}"
    return (
        f"{prompts}same top token at "
        f"{distributions['top1_agreement']:.1%} of {distributions['num_positions']} positions, "
        f"{_divergence(distributions)}{_answers(certificate.get('answers'))}{_weights(certificate.get('weights'))}"
    )


def _served(served: Record, distributions: Record | None) -> str:
    """Return what a server answered, in words."""
    greedy, parts = served["greedy"], []
    if distributions is not None:
        parts.append(
            f"same top token at {distributions['top1_agreement']:.1%} of {distributions['num_positions']} positions, "
            f"{_divergence(distributions)}"
        )
    if served["share"] is not None:
        parts.append(f"{served['share']:.0%} of what training changed")
    if greedy is not None:
        parts.append(f"{greedy['same']} of {greedy['num_prompts']} greedy answers (the base {greedy['base_same']})")
    return ", ".join(parts) or "nothing else could be compared"


def _divergence(distributions: Record) -> str:
    kl = distributions["mean_kl"]
    shown = "not finite" if kl is None else f"{kl:.2g} nats"
    return f"mean KL {shown} (the base's {distributions['base_kl']:.2g})"


def _weights(weights: Record | None) -> str:
    if weights is None:
        return ""
    if weights["relative_error"] > 1:  # a share of the update that is mostly rounding would say nothing
        return f", a rounding error of {weights['relative_error']:.2g} times the update in the weights"
    return f", {weights['kept']:.0%} of the update in the weights"


def _compare_prompts(expected: ReferenceOutputs, target: Target) -> Record:
    first = ""
    same = 0
    for question in expected.questions:
        ids = target.prompt_ids(question.messages, question.tools)
        if ids == question.input_ids:
            same += 1
        elif not first:
            pairs = zip([*ids, None], [*question.input_ids, None], strict=False)
            start = next(index for index, (actual, wanted) in enumerate(pairs) if actual != wanted)
            first = (
                f"at token {start}, {ids[start : start + 5]} where training has {question.input_ids[start : start + 5]}"
            )
    return {"num_prompts": len(expected.questions), "same_token_ids": same, "first_difference": first or None}


def _compare_distributions(
    expected: ReferenceOutputs, target: Target, tolerance: Tolerance, known: bool, progress: Callable[[], None]
) -> tuple[Record, float]:
    """Return the record of the comparison, and the largest mean KL divergence that passes."""

    def outputs() -> Iterator[torch.Tensor]:
        for example in expected.examples:
            yield target.logits(example.input_ids.tolist(), (np.flatnonzero(example.supervised) - 1).tolist())
            progress()

    found = divergence_from(expected.logprobs, outputs())
    first_two_P2 = torch.cat([logprobs.double().topk(2).values for logprobs in expected.logprobs])
    decided = first_two_P2[:, 0] - first_two_P2[:, 1] >= tolerance.margin
    num_decided = int(decided.sum())
    noise = expected.rounded.mean_kl
    base = expected.base.mean_kl or 0.0
    limit = MORE_THAN_ROUNDING * (noise or 0.0) + tolerance.mean_kl
    if not known:
        limit = max(tolerance.mean_kl, NEARER_THAN_BASE * base)
    finite = found.mean_kl is not None
    record = {
        "num_examples": len(expected.examples),
        "num_positions": len(found.kl),
        "top1_agreement": float(found.same_top.double().mean()),
        "num_decided": num_decided,
        "num_flipped": int((~found.same_top[decided]).sum()),
        "num_allowed": allowed_flips(num_decided, int((~expected.rounded.same_top[decided]).sum())),
        "decided_agreement": float(found.same_top[decided].double().mean()) if num_decided else 1.0,
        "mean_kl": found.mean_kl,
        "max_kl": float(found.kl.max()) if finite else None,
        "base_kl": base,
        "rounding_kl": noise or 0.0,
    }
    return record, limit


def _answers(record: Record | None) -> str:
    if not record:
        return ""
    same = f", {record['same']} of {record['num_prompts']} greedy answers ({record['share']:.1%})"
    return same + (f", {score_in_words(record)}" if record.get("scores") else "")


def score_in_words(answers: Record) -> str:
    """Return the metric of the target's answers, and what the export cost: `json 80.0% (-2.0 points, -6.0 to +2.0)`."""
    scores, metric = answers["scores"], measure_in_words(answers["metric"])
    graded = answers["metric"] == "bleu"
    change = [scores["difference"][key] * (1 if graded else 100) for key in ("value", "low", "high")]
    value = f"{scores['score']:.4g}" if graded else f"{scores['score']:.1%}"
    return f"{metric} {value} ({change[0]:+.1f} points, {change[1]:+.1f} to {change[2]:+.1f})"
