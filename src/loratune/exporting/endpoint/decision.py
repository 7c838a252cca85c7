"""From a server's answers to the verdict on it, as `exporting.verdict` does it for files."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from loratune.exporting.certificate import ROUNDED, with_decision
from loratune.exporting.endpoint.proof import DEVIATIONS
from loratune.exporting.verdict import FEW_POSITIONS, Decision, allowed_flips

if TYPE_CHECKING:
    from loratune.exporting.endpoint.client import Endpoint
    from loratune.exporting.endpoint.proof import ServedAnswers, ServedDistributions
    from loratune.exporting.endpoint.reference import EndpointReference
    from loratune.run.directory import Record

_MORE_ROWS = "compare on more rows: data.eval"
_TEMPLATE = "serve the model with the chat template in the run's adapter folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEvidence:
    """Everything that the verdict on a server is based on.

    Attributes:
        endpoint: The server.
        way: How it gives log-probabilities; empty if it does not.
        template: The comparison of prompts.
        distributions: The comparison of distributions.
        answers: The comparison of greedy answers.
    """

    endpoint: Endpoint
    way: str
    template: Record
    distributions: ServedDistributions
    answers: ServedAnswers


def served_certificate(expected: EndpointReference, evidence: ServedEvidence) -> Record:
    """Return the certificate of a server."""
    found = evidence.distributions.record()
    num_decided = found["num_decided"] if found else 0
    allowed = allowed_flips(num_decided, 0)
    endpoint, way = evidence.endpoint, evidence.way or "no log-probabilities"
    program = f" ({endpoint.program})" if endpoint.program else ""
    return {
        **with_decision(decide_served(evidence)),
        "checked_with": f"{endpoint.url}{program}, model {endpoint.model}, {way}",
        "template": evidence.template,
        "stop_tokens": {"ids": list(expected.stop_token_ids), "missing": evidence.answers.missing_stops},
        "distributions": found,
        "weights": None,
        "tolerance": {
            "mean_kl": evidence.distributions.limit,
            "margin": ROUNDED.margin,
            "top1": 1 - allowed / num_decided if num_decided else 0.0,
            "reason": f"{asdict(ROUNDED)['reason']}, and weights whose rounding is unknown",
        },
        "compared_on": expected.compared_on,
        "served": _served_record(evidence),
        "loratune": importlib.metadata.version("loratune"),
    }


def _served_record(evidence: ServedEvidence) -> Record:
    share, error = evidence.distributions.share
    measured = bool(evidence.distributions.shares) and error < float("inf")
    return {
        "model": evidence.endpoint.model,
        "way": evidence.way or None,
        "num_unread": evidence.distributions.num_unread,
        "share": share if measured else None,
        "share_error": error if measured else None,
        "greedy": evidence.answers.record(),
    }


def decide_served(evidence: ServedEvidence) -> Decision:
    """Return the verdict on a server."""
    complaints = _complaints(evidence)
    if complaints:
        what = [what for what, _ in complaints]
        fix = "; ".join(dict.fromkeys(fix for _, fix in complaints))
        return Decision(verdict="different", complaints=what, reason="; ".join(what), fix=fix)
    distributions, answers = evidence.distributions, evidence.answers
    if distributions.served_kl:
        kl, base, positions = distributions.mean_kl, distributions.mean_base_kl, len(distributions.served_kl)
        if kl <= distributions.limit < base and positions >= FEW_POSITIONS:
            reason = f"its mean KL divergence from the trained model is {kl:.2g} nats; the base's is {base:.2g}"
            return Decision(verdict="same", complaints=[], reason=f"{reason}{_unseen(evidence)}", fix="")
    elif answers.is_same and answers.has_power:
        reason = (
            f"{answers.num_same} of {answers.num_compared} greedy answers begin as the trained model's; the base would "
            f"give {answers.num_base_same}"
        )
        return Decision(verdict="same", complaints=[], reason=f"{reason}{_unseen(evidence)}", fix="")
    return _undecided(evidence)


def _unseen(evidence: ServedEvidence) -> str:
    """Return what the server does not show, in words."""
    unseen = [] if evidence.template["num_prompts"] else ["the tokens of its prompts"]
    unseen += [] if evidence.answers.num_stops_seen else ["where it stops"]
    return f" (not shown by it: {' and '.join(unseen)})" if unseen else ""


def _complaints(evidence: ServedEvidence) -> list[tuple[str, str]]:
    """Return what is surely different, each with what the user can do about it."""
    complaints = []
    template, answers = evidence.template, evidence.answers
    other = template["num_prompts"] - template["same_token_ids"]
    if other:
        text = f"{other} of {template['num_prompts']} prompts have different token ids: {template['first_difference']}"
        complaints.append((text, _TEMPLATE))
    if answers.missing_stops:
        text = f"answers do not end at the tokens {answers.missing_stops}"
        complaints.append((text, "set these as stop tokens in the server: eos_token_id in generation_config.json"))
    share, error = evidence.distributions.share
    if share + DEVIATIONS * error < 1 / 2:
        base = abs(share) < max(DEVIATIONS * error, 1 / 16)
        kl, base_kl = evidence.distributions.mean_kl, evidence.distributions.mean_base_kl
        text = (
            f"its outputs have {share:.0%} of what training changed (± {error:.0%}), at a mean KL divergence of "
            f"{kl:.2g} nats from the trained model; the base's is {base_kl:.2g}"
        )
        complaints.append(
            (f"{_as_base(evidence) if base else 'it serves another model'}: {text}", _other_model(evidence))
        )
    elif not complaints and answers.is_other:
        near = evidence.distributions.served_kl and share - DEVIATIONS * error > 1 / 2
        text = (
            f"{answers.num_changed_same} of {answers.num_changed} answers that training changed are the trained model's"
        )
        if near:
            complaints.append((f"in a chat, only {text}, although its outputs for the same tokens are", _TEMPLATE))
        elif answers.num_as_base * 2 > answers.num_changed:
            text = f"{text}, {answers.num_as_base} are the base's"
            complaints.append((f"{_as_base(evidence)}: {text}", _other_model(evidence)))
        else:
            complaints.append((f"it answers like another model: {text}", _other_model(evidence)))
    return complaints


def _as_base(evidence: ServedEvidence) -> str:
    return f"{evidence.endpoint.model} answers like the base without the adapter"


def _other_model(evidence: ServedEvidence) -> str:
    others = [name for name in evidence.endpoint.models if name != evidence.endpoint.model]
    if others:
        return (
            f"--model NAME, with one of {', '.join(others[:10])}; or start the server with this run's adapter or file"
        )
    return "start the server with this run's adapter, or with the file that `loratune export` wrote"


def _undecided(evidence: ServedEvidence) -> Decision:
    distributions, answers = evidence.distributions, evidence.answers

    def undecided(reason: str, fix: str) -> Decision:
        return Decision(verdict="undecided", complaints=[], reason=reason, fix=fix)

    longer = "train longer, or at a higher learning rate"
    if distributions.served_kl:
        kl, base, positions = distributions.mean_kl, distributions.mean_base_kl, len(distributions.served_kl)
        if positions < FEW_POSITIONS:
            return undecided(f"only {positions} positions could be compared, fewer than {FEW_POSITIONS}", _MORE_ROWS)
        if base <= distributions.limit:
            reason = (
                f"training moved the model by {base:.2g} nats, no further than rounding and arithmetic may "
                f"({distributions.limit:.2g}), so the base without the adapter would pass, too"
            )
            return undecided(reason, longer)
        share, error = distributions.share
        return undecided(
            f"its mean KL divergence from the trained model is {kl:.2g} nats, the base's {base:.2g}, and how its "
            f"weights were rounded is unknown; it has {share:.0%} of what training changed (± {error:.0%})",
            "certify the file that is served, or serve one with smaller rounding errors: f16 or q8_0",
        )
    if not answers.num_compared:
        return undecided(
            "it gives no log-probabilities, and no chat could be compared",
            "serve it with llama.cpp or vLLM, which give log-probabilities",
        )
    if not answers.has_power:
        return undecided(
            f"it gives no log-probabilities, and the base without the adapter would answer only {answers.num_changed} "
            f"of {answers.num_compared} chats in another way, too few to tell them apart",
            f"{_MORE_ROWS}; serve it with llama.cpp or vLLM, which give log-probabilities; or {longer}",
        )
    return undecided(
        f"it gives no log-probabilities, and {answers.num_same} of {answers.num_compared} greedy answers begin as the "
        f"trained model's; how its weights were rounded is unknown",
        "certify the file that is served, or serve it with llama.cpp or vLLM, which give log-probabilities",
    )
