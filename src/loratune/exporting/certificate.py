"""The certificate: evidence that an exported model is the one that was trained.

Three proofs, each of which can fail (`verdict` combines them):

- prompts, stop tokens and settings: the token ids of prompts, rendered by the target's own template and tokenized by
  its own tokenizer; the tokens that end an answer; the configuration of the model (`structure`).
- weights (`weights_proof`): written minus base against the trained update, tensor by tensor, where they can be read.
- distributions of the next token at positions of answers: KL(trained ‖ target) against two yardsticks at the same
  positions: KL(trained ‖ base), and KL(trained ‖ trained), the latter with weights rounded as the target's are, in
  training's own code. Arithmetic is float32 on both sides, since how 16-bit sums round is no property of an export.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from loratune.data.batch import collate
from loratune.data.prompts import stop_token_ids
from loratune.exporting.verdict import Decision, Evidence, allowed_flips, decide
from loratune.model.arithmetic import Change, float32_arithmetic
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.exporting.places import Question
    from loratune.exporting.weights_proof import Rounding
    from loratune.run.directory import Record
    from loratune.training.loss import SupervisedLoss

BATCH_TOKENS = 2048
"""The most tokens of a forward pass of the reference."""
MORE_THAN_ROUNDING = 2.0
"""How many times the divergence of the rounded trained model a right export may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far arithmetic alone may move the outputs of a right export.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far a model's next-token distributions are from those of the trained model.

    Attributes:
        kl: KL(trained ‖ model) of each position, in nats, float64 [P].
        same_top: Whether both have the same likeliest token, [P].
    """

    kl: torch.Tensor
    same_top: torch.Tensor

    @property
    def mean_kl(self) -> float | None:
        """The mean, in nats; None where logits are not finite."""
        return max(0.0, float(self.kl.mean())) if bool(self.kl.isfinite().all()) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOutputs:
    """The outputs of base and adapter in the training code.

    Attributes:
        examples: Examples; their supervised tokens are the positions to compare.
        logprobs: Per example float32 [positions, V].
        questions: Prompts; none for plain text.
        stop_token_ids: The tokens that end an answer.
        base: The base without the adapter.
        rounded: Base and adapter with weights rounded as the target's are.
        compared_on: Where the examples are from: `held-out`, `training` or `held-out and training`.
    """

    examples: list[Example]
    logprobs: list[torch.Tensor]
    questions: list[Question]
    stop_token_ids: tuple[int, ...]
    base: Divergence
    rounded: Divergence
    compared_on: str = "held-out"


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
        prove: Returns the proof by weights; None where there is none.
        settings: Returns the settings that differ from the base's, in words.
        way_out: What the user can do where rounding loses the update.
    """

    load: Load
    tolerance: Tolerance
    rounding: Rounding | None = None
    prove: Callable[[], Record | None] = lambda: None
    settings: Callable[[], list[str]] = list
    way_out: str = "the adapter alone, without merging"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where training and an export are compared.

    Attributes:
        examples: Examples, whose supervised tokens are the positions to compare.
        questions: Prompts.
        compared_on: Where the examples are from.
    """

    examples: Sequence[Example]
    questions: Sequence[Question] = field(default=())
    compared_on: str = "held-out"


def reference_outputs(
    loss: SupervisedLoss,
    places: Places,
    tokenizer: PreTrainedTokenizerBase,
    *,
    packed: bool,
    change: Change | None,
    progress: Callable[[int], None] = lambda _: None,
) -> ReferenceOutputs:
    """Run base and adapter in the training code, the base alone, and base and adapter rounded as the target is.

    Args:
        loss: The loss of the adapted model, in evaluation mode.
        places: Where to compare.
        tokenizer: The tokenizer of training.
        packed: Whether the base's weights are packed, so that they cannot be computed with in float32.
        change: Rounds the model's tensors as the target's are; None where they are not rounded.
        progress: Called with the number of examples done.

    Raises:
        RunError: There are no examples to compare on.
    """
    if not places.examples:
        raise RunError("the run has no answers to compare on", fix="train with data.eval")

    def arithmetic(change: Change | None = None) -> AbstractContextManager[None]:
        return nullcontext() if packed else float32_arithmetic(loss.model, change)

    with arithmetic():
        wanted = [logits.log_softmax(-1).cpu() for logits in _outputs(loss, places.examples, progress)]
    with arithmetic(), loss.model.disable_adapter():
        base = divergence_from(wanted, _outputs(loss, places.examples, progress))
    rounded = Divergence(kl=torch.zeros_like(base.kl), same_top=torch.ones_like(base.same_top))
    if change is not None and not packed:
        with arithmetic(change):
            rounded = divergence_from(wanted, _outputs(loss, places.examples, progress))
    return ReferenceOutputs(
        examples=list(places.examples),
        logprobs=wanted,
        questions=list(places.questions),
        stop_token_ids=stop_token_ids(tokenizer),
        base=base,
        rounded=rounded,
        compared_on=places.compared_on,
    )


def _outputs(
    loss: SupervisedLoss, examples: Sequence[Example], progress: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    """Yield the logits at each example's positions, float32 [positions, V]."""
    batch: list[Example] = []
    for example in [*examples, None]:
        tokens = sum(len(other.input_ids) for other in batch)
        if batch and (example is None or tokens + len(example.input_ids) > BATCH_TOKENS):
            logits = loss.logits(collate(batch).to(loss.model.device))
            labelled = len(logits) == len(batch)
            counts = [1 if labelled else int(other.supervised[1:].sum()) for other in batch]
            yield from logits.float().split(counts)
            progress(len(batch))
            batch = []
        if example is not None:
            batch.append(example)


def divergence_from(wanted: Sequence[torch.Tensor], outputs: Iterator[torch.Tensor]) -> Divergence:
    """Compare logits with the log-probabilities of the trained model.

    Args:
        wanted: Per example, the log-probabilities, [positions, V].
        outputs: Per example, the logits, [positions, V']; targets may pad the vocabulary.
    """
    kl, same = [], []
    for wanted_SV, logits_SV in zip(wanted, outputs, strict=True):
        width = min(logits_SV.shape[1], wanted_SV.shape[1])
        actual_SV = logits_SV[:, :width].cpu().double().log_softmax(-1)
        trained_SV = wanted_SV[:, :width].double()
        kl.append((trained_SV.exp() * (trained_SV - actual_SV)).sum(-1))
        same.append(trained_SV.argmax(-1) == actual_SV.argmax(-1))
    return Divergence(kl=torch.cat(kl), same_top=torch.cat(same))


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
    distributions, limit = _compare_distributions(expected, target, written.tolerance, progress)
    missing = [token for token in expected.stop_token_ids if not target.ends_with(token)]
    weights = written.prove()
    decision = decide(
        Evidence(
            template=template,
            missing_stops=missing if stops_required else [],
            settings=written.settings(),
            distributions=distributions,
            limit=limit,
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
    return (
        f"verified with {certificate['checked_with']}: {verdict} model; same token ids for "
        f"{template['same_token_ids']} of {template['num_prompts']} prompts, same top token at "
        f"{distributions['top1_agreement']:.1%} of {distributions['num_positions']} positions, "
        f"{_divergence(distributions)}{_answers(certificate.get('answers'))}{_weights(certificate.get('weights'))}"
    )


def _divergence(distributions: Record) -> str:
    kl = distributions["mean_kl"]
    shown = "not finite" if kl is None else f"{kl:.2g} nats"
    return f"mean KL {shown} (the base's {distributions['base_kl']:.2g})"


def _weights(weights: Record | None) -> str:
    return "" if weights is None else f", {weights['kept']:.0%} of the update in the weights"


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
    expected: ReferenceOutputs, target: Target, tolerance: Tolerance, progress: Callable[[], None]
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
    limit = MORE_THAN_ROUNDING * (noise or 0.0) + tolerance.mean_kl
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
        "base_kl": expected.base.mean_kl or 0.0,
        "rounding_kl": noise or 0.0,
    }
    return record, limit


def _answers(record: Record | None) -> str:
    return f", {record['same']} of {record['num_prompts']} greedy answers ({record['share']:.1%})" if record else ""
