"""What the trained model says, in training's own code: the reference of a certificate, and its two yardsticks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from loratune.data.batch import collate
from loratune.data.prompts import stop_token_ids
from loratune.model.arithmetic import Change, float32_arithmetic
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.exporting.places import Question
    from loratune.training.loss import SupervisedLoss

BATCH_TOKENS = 2048
"""The most tokens of a forward pass of the reference."""


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
        wanted = [logits.log_softmax(-1).cpu() for logits in outputs_at(loss, places.examples, progress)]
    with arithmetic(), loss.model.disable_adapter():
        base = divergence_from(wanted, outputs_at(loss, places.examples, progress))
    rounded = Divergence(kl=torch.zeros_like(base.kl), same_top=torch.ones_like(base.same_top))
    if change is not None and not packed:
        with arithmetic(change):
            rounded = divergence_from(wanted, outputs_at(loss, places.examples, progress))
    # A classifier's tokenizer may have neither; a token without a row in the head can end no answer.
    stops = stop_token_ids(tokenizer) if tokenizer.chat_template or tokenizer.eos_token else ()
    return ReferenceOutputs(
        examples=list(places.examples),
        logprobs=wanted,
        questions=list(places.questions),
        stop_token_ids=tuple(token for token in stops if token < wanted[0].shape[1]),
        base=base,
        rounded=rounded,
        compared_on=places.compared_on,
    )


def outputs_at(
    loss: SupervisedLoss, examples: Sequence[Example], progress: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    """Yield the logits at each example's positions, float32 [positions, V]."""
    batch: list[Example] = []
    for example in [*examples, None]:
        tokens = sum(len(other.input_ids) for other in batch)
        if batch and (example is None or tokens + len(example.input_ids) > BATCH_TOKENS):
            logits = loss.logits(collate(batch).to(loss.model.device))
            labeled = len(logits) == len(batch)
            counts = [1 if labeled else int(other.supervised[1:].sum()) for other in batch]
            yield from torch.split(logits.float(), counts)
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
        # Normalized again: a float32 sum over a large vocabulary is off by 1e-5, which all of a divergence would show.
        trained_SV = wanted_SV[:, :width].double().log_softmax(-1)
        kl.append((trained_SV.exp() * (trained_SV - actual_SV)).sum(-1))
        same.append(trained_SV.argmax(-1) == actual_SV.argmax(-1))
    return Divergence(kl=torch.cat(kl), same_top=torch.cat(same))
