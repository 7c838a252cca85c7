"""The certificate: does what was written answer as the adapter on its base did in training's own code?

Three things are compared on held-out conversations. The token ids of prompts, rendered by the target's own template and
tokenised by its own tokenizer. The tokens that end an answer. And the distributions of the next token, at the places of
answers, as logits of both.
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
from loratune.data.rows.conversation import Conversation
from loratune.run.directory import Record
from loratune.run.errors import RunError
from loratune.training.loss import SupervisedLoss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_POSITIONS = 512
"""Places whose distributions are compared: with a vocabulary of 150,000, 0.3 GB of log-probabilities."""
POSITIONS_PER_EXAMPLE = 32
MAX_PROMPTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What may differ.

    Attributes:
        mean_kl: The largest mean of KL(training ‖ target) over all places, in nats.
        margin: Where the likeliest token leads the second by less, in nats, a swap of the two counts for nothing.
        top1: The smallest share of the other places where both name the same likeliest token.
        reason: What the difference comes from.
    """

    mean_kl: float
    margin: float
    top1: float
    reason: str


EXACT = Tolerance(mean_kl=1e-5, margin=0.01, top1=1.0, reason="float32 on both sides: another order of summation")
ROUNDED = Tolerance(mean_kl=0.01, margin=0.25, top1=0.99, reason="weights or arithmetic in 16 bits")
QUANTISED = Tolerance(mean_kl=0.03, margin=0.5, top1=0.98, reason="weights or arithmetic in 8 bits or fewer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A held-out conversation up to its last answer, and the token ids that training makes of it."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    input_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOutputs:
    """What training's own code says.

    Attributes:
        examples: Held-out examples; the supervised tokens are the places that are compared.
        logprobs: For each example float32 [places, V].
        questions: Prompts; none for plain text.
        stop_token_ids: What ends an answer.
    """

    examples: list[Example]
    logprobs: list[torch.Tensor]
    questions: list[Question]
    stop_token_ids: tuple[int, ...]


class Target(Protocol):
    """Something that was written, loaded back by the code that will serve it, or by the nearest that is at hand."""

    checked_with: str
    """That code and its version."""

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        """The prompt for the next answer, by the target's own template and tokenizer."""
        ...

    def logits(self, input_ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """Float32 [len(places), V]: what predicts the token after each place."""
        ...

    def ends_with(self, token_id: int) -> bool:
        """Whether an answer ends at this token."""
        ...


def choose_examples(held_out: Sequence[Example]) -> list[Example]:
    """Held-out examples with the places to compare: evenly over each one's supervised tokens, the first and last included."""
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
    """Prompts for the last answers of held-out conversations, as training renders them."""
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
    """Ask the adapter on its base, in training's own code.

    Args:
        loss: Of the adapted model, in evaluation mode.
        held_out: As `choose_examples` returns them.
        questions: As `choose_questions` returns them.
        tokenizer: Of training.
        progress: Called after each example.

    Raises:
        RunError: There is nothing to compare on.
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
    """Compare, and say whether it passes. The record is `parity.json`.

    Args:
        expected: Of training.
        target: What was written.
        tolerance: What may differ.
        stops_required: Whether the target itself must end answers where training does; an adapter cannot make its base.
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
    """One line for people."""
    template, distributions = certificate["template"], certificate["distributions"]
    if certificate.get("compares") == "classes":
        return (
            f"{'same' if certificate['passed'] else 'NOT the same'} classifier, by {certificate['checked_with']}: token ids of "
            f"{template['same_token_ids']} of {template['num_prompts']} texts, the class of {distributions['top1_agreement']:.1%}, "
            f"mean KL {distributions['mean_kl']:.2g} nats"
        )
    return (
        f"{'same' if certificate['passed'] else 'NOT the same'} model, by {certificate['checked_with']}: "
        f"token ids of {template['same_token_ids']} of {template['num_prompts']} prompts, likeliest token at "
        f"{distributions['top1_agreement']:.1%} of {distributions['num_positions']} places, mean KL "
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
            place = next(place for place, (mine, wanted) in enumerate(pairs) if mine != wanted)
            first = (
                f"at token {place}, {ids[place : place + 5]} where training has {question.input_ids[place : place + 5]}"
            )
    return {"num_prompts": len(expected.questions), "same_token_ids": same, "first_difference": first or None}


def _compare_distributions(
    expected: ReferenceOutputs, target: Target, tolerance: Tolerance, progress: Callable[[], None]
) -> Record:
    divergences, agreements, leads = [], [], []
    for example, wanted in zip(expected.examples, expected.logprobs, strict=True):
        places = (np.flatnonzero(example.supervised) - 1).tolist()
        logits_SV = target.logits(example.input_ids.tolist(), places)
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
            f"{other} of {template['num_prompts']} prompts have other token ids: {template['first_difference']}"
        )
    kl, agreement = distributions["mean_kl"], distributions["decided_agreement"]
    if kl is None:
        complaints.append("its logits are not numbers")
    elif kl > tolerance.mean_kl:
        complaints.append(f"the mean KL divergence is {kl:.2g} nats, more than {tolerance.mean_kl:g}")
    if agreement < tolerance.top1:
        complaints.append(
            f"the likeliest token agrees at {agreement:.1%} of {distributions['num_decided']} decided places, "
            f"less than {tolerance.top1:.1%}"
        )
    return complaints


def _answers(record: Record | None) -> str:
    return f", {record['same']} of {record['num_prompts']} greedy answers ({record['share']:.1%})" if record else ""
