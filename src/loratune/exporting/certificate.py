"""The certificate: evidence that an exported model computes what base and adapter compute in the training code.

Three things are compared on held-out conversations: the token ids of prompts, rendered by the target's own template and
tokenized by its own tokenizer; the tokens that end an answer; and the distributions of the next token at the positions
of answers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from loratune.data.batch import collate
from loratune.data.examples import Example
from loratune.data.prompts import render_prompts, stop_token_ids
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loratune.data.rows.conversation import Conversation
    from loratune.run.directory import Record
    from loratune.training.loss import SupervisedLoss

MAX_POSITIONS = 512
"""The most positions at which distributions are compared: 0.3 GB of log-probabilities for a vocabulary of 150,000."""
POSITIONS_PER_EXAMPLE = 32
MAX_PROMPTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far an exported model may differ from training.

    Attributes:
        mean_kl: The largest mean KL(training ‖ target) over all positions, in nats.
        margin: The lead of the top token over the second, in nats, from which a position counts as decided.
        top1: The smallest share of decided positions where both have the same top token, 0 to 1.
        reason: Why the two may differ.
    """

    mean_kl: float
    margin: float
    top1: float
    reason: str


EXACT = Tolerance(mean_kl=1e-5, margin=0.01, top1=1.0, reason="float32 on both sides, summed in a different order")
ROUNDED = Tolerance(mean_kl=0.01, margin=0.25, top1=0.99, reason="weights or arithmetic in 16 bits")
QUANTIZED = Tolerance(mean_kl=0.03, margin=0.5, top1=0.98, reason="weights or arithmetic in 8 bits or fewer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A held-out conversation up to its last answer, with the token ids that training gives it."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    input_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOutputs:
    """The outputs of base and adapter in the training code.

    Attributes:
        examples: Held-out examples; their supervised tokens are the positions to compare.
        logprobs: Per example float32 [positions, V].
        questions: Prompts; none for plain text.
        stop_token_ids: The tokens that end an answer.
    """

    examples: list[Example]
    logprobs: list[torch.Tensor]
    questions: list[Question]
    stop_token_ids: tuple[int, ...]


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


def choose_examples(held_out: Sequence[Example]) -> list[Example]:
    """Choose the positions to compare: evenly over each example's supervised tokens, including the first and last.

    Returns:
        The examples, cut after their last chosen position, with only the chosen tokens supervised.
    """
    chosen: list[Example] = []
    left = MAX_POSITIONS
    for example in held_out:
        supervised = np.flatnonzero(example.supervised[1:]) + 1
        count = min(len(supervised), POSITIONS_PER_EXAMPLE, left)
        if count == 0:
            continue
        mask = np.zeros_like(example.supervised)
        mask[supervised[np.linspace(0, len(supervised) - 1, count).round().astype(int)]] = True
        end = int(np.flatnonzero(mask)[-1]) + 1
        chosen.append(Example(input_ids=example.input_ids[:end], supervised=mask[:end], origin=example.origin))
        left -= count
    return chosen


def choose_questions(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, limit: int = MAX_PROMPTS
) -> list[Question]:
    """Return prompts for the last answers of held-out conversations, as training renders them."""
    questions: list[Question] = []
    for conversation in conversations:
        for prompt in render_prompts([conversation], tokenizer):
            roles = [message["role"] for message in conversation.messages]
            turn = len(roles) - 1 - roles[::-1].index("assistant")
            questions.append(
                Question(messages=conversation.messages[:turn], tools=conversation.tools, input_ids=prompt.input_ids)
            )
        if len(questions) == limit:
            break
    return questions


def reference_outputs(
    loss: SupervisedLoss,
    held_out: Sequence[Example],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[], None] = lambda: None,
) -> ReferenceOutputs:
    """Run base and adapter in the training code.

    Args:
        loss: The loss of the adapted model, in evaluation mode.
        held_out: Examples from `choose_examples`.
        questions: Prompts from `choose_questions`.
        tokenizer: The tokenizer of training.
        progress: Called after each example.

    Raises:
        RunError: There are no examples to compare on.
    """
    if not held_out:
        raise RunError("the run has no held-out answers to compare on", fix="train with data.eval")
    logprobs = []
    for example in held_out:
        logits = loss.logits(collate([example]).to(loss.model.device))
        logprobs.append(logits.log_softmax(-1).cpu())
        progress()
    return ReferenceOutputs(
        examples=list(held_out),
        logprobs=logprobs,
        questions=list(questions),
        stop_token_ids=stop_token_ids(tokenizer),
    )


def certify(
    expected: ReferenceOutputs,
    target: Target,
    tolerance: Tolerance,
    *,
    stops_required: bool,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """Compare an export with training. Return the record `parity.json`, whose `passed` gives the verdict.

    Args:
        expected: The outputs of training.
        target: The export, loaded back.
        tolerance: How far the two may differ.
        stops_required: Whether the target itself must stop where training does. False for an adapter, which cannot
            change where its base stops.
        progress: Called after each example.
    """
    template = _compare_prompts(expected, target)
    distributions = _compare_distributions(expected, target, tolerance, progress)
    missing = [token for token in expected.stop_token_ids if not target.ends_with(token)]
    complaints = _complaints(template, distributions, tolerance)
    if missing and stops_required:
        complaints.append(f"answers do not end at the tokens {missing}")
    return {
        "passed": not complaints,
        "complaints": complaints,
        "checked_with": target.checked_with,
        "template": template,
        "stop_tokens": {"ids": list(expected.stop_token_ids), "missing": missing},
        "distributions": distributions,
        "tolerance": asdict(tolerance),
        "loratune": importlib.metadata.version("loratune"),
    }


def summary(certificate: Record) -> str:
    """Return the certificate in one line for people."""
    template, distributions = certificate["template"], certificate["distributions"]
    verdict = "same" if certificate["passed"] else "NOT the same"
    if certificate.get("compares") == "classes":
        return (
            f"verified with {certificate['checked_with']}: {verdict} classifier; same token ids for "
            f"{template['same_token_ids']} of {template['num_prompts']} texts, same class for "
            f"{distributions['top1_agreement']:.1%}, mean KL {distributions['mean_kl']:.2g} nats"
        )
    return (
        f"verified with {certificate['checked_with']}: {verdict} model; same token ids for "
        f"{template['same_token_ids']} of {template['num_prompts']} prompts, same top token at "
        f"{distributions['top1_agreement']:.1%} of {distributions['num_positions']} positions, mean KL "
        f"{distributions['mean_kl']:.2g} nats{_answers(certificate.get('answers'))}"
    )


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
) -> Record:
    divergences, agreements, leads = [], [], []
    for example, wanted in zip(expected.examples, expected.logprobs, strict=True):
        positions = (np.flatnonzero(example.supervised) - 1).tolist()
        logits_SV = target.logits(example.input_ids.tolist(), positions)
        width = min(logits_SV.shape[1], wanted.shape[1])  # targets may pad the vocabulary
        actual_SV = logits_SV[:, :width].cpu().double().log_softmax(-1)
        wanted_SV = wanted[:, :width].double()
        divergences.append((wanted_SV.exp() * (wanted_SV - actual_SV)).sum(-1))
        agreements.append(wanted_SV.argmax(-1) == actual_SV.argmax(-1))
        first_two_S2 = wanted_SV.topk(2).values
        leads.append(first_two_S2[:, 0] - first_two_S2[:, 1])
        progress()
    kl, agree, decided = torch.cat(divergences), torch.cat(agreements), torch.cat(leads) >= tolerance.margin
    return {
        "num_examples": len(expected.examples),
        "num_positions": len(kl),
        "top1_agreement": float(agree.double().mean()),
        "num_decided": int(decided.sum()),
        "decided_agreement": float(agree[decided].double().mean()) if bool(decided.any()) else 1.0,
        "mean_kl": max(0.0, float(kl.mean())) if bool(kl.isfinite().all()) else None,
        "max_kl": float(kl.max()) if bool(kl.isfinite().all()) else None,
    }


def _complaints(template: Record, distributions: Record, tolerance: Tolerance) -> list[str]:
    complaints = []
    other = template["num_prompts"] - template["same_token_ids"]
    if other:
        complaints.append(
            f"{other} of {template['num_prompts']} prompts have different token ids: {template['first_difference']}"
        )
    kl, agreement = distributions["mean_kl"], distributions["decided_agreement"]
    if kl is None:
        complaints.append("its logits are not finite")
    elif kl > tolerance.mean_kl:
        complaints.append(f"the mean KL divergence is {kl:.2g} nats, more than {tolerance.mean_kl:g}")
    if agreement < tolerance.top1:
        complaints.append(
            f"the top token is the same at {agreement:.1%} of {distributions['num_decided']} positions where it leads "
            f"clearly, less than {tolerance.top1:.1%}"
        )
    return complaints


def _answers(record: Record | None) -> str:
    return f", {record['same']} of {record['num_prompts']} greedy answers ({record['share']:.1%})" if record else ""
