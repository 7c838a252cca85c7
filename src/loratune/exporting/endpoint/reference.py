"""The outputs of the trained model and its base in training's own code, with which a server is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.exporting.reference_outputs import outputs_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from transformers import PreTrainedTokenizerBase

    from loratune.exporting.places import Question
    from loratune.training.loss import SupervisedLoss

CLEAR_LEAD = 1.0
"""The lead of a token over the next, in nats, that neither 16-bit sums nor usual quantizations turn around."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyAnswer:
    """The trained model's greedy answer to a prompt.

    Attributes:
        question: The prompt.
        clear: The beginning of the answer in which each token leads by `CLEAR_LEAD`.
        stop: The token that ends the answer; None if it does not end, or not clearly.
        base: The base's answer, without the adapter.
    """

    question: Question
    clear: str
    stop: int | None
    base: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointReference:
    """The outputs of training that a server is compared with.

    Attributes:
        examples: Examples; their supervised tokens are the positions to compare.
        trained: Per example the trained model's log-probabilities, float32 [positions, V].
        base: Per example the base's, without the adapter.
        answers: Greedy answers.
        max_new_tokens: The limit of the answers, in tokens.
        compared_on: Where the examples are from: `held-out`, `training` or `held-out and training`.
        stop_token_ids: The tokens that end an answer.
    """

    examples: Sequence[Example]
    trained: Sequence[torch.Tensor]
    base: Sequence[torch.Tensor]
    answers: Sequence[GreedyAnswer]
    max_new_tokens: int
    compared_on: str
    stop_token_ids: tuple[int, ...]


def logprobs_at(
    loss: SupervisedLoss, examples: Sequence[Example], progress: Callable[[int], None] = lambda _: None
) -> list[torch.Tensor]:
    """Return the log-probabilities at each example's positions, float32 [positions, V]."""
    return [logits.log_softmax(-1).cpu() for logits in outputs_at(loss, examples, progress)]


def clear_tokens(loss: SupervisedLoss, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """Return how many tokens at the beginning of an answer lead clearly over the next likeliest."""
    if not answer:
        return 0
    supervised = np.zeros(len(prompt) + len(answer), dtype=bool)
    supervised[len(prompt) :] = True
    ids = np.array([*prompt, *answer], dtype=np.int32)
    example = Example(input_ids=ids, supervised=supervised, origin=Origin(file="answer", line=1))
    (logits,) = outputs_at(loss, [example], lambda _: None)
    first_two = logits.log_softmax(-1).topk(2).values
    unclear = (first_two[:, 0] - first_two[:, 1] < CLEAR_LEAD).nonzero()
    return int(unclear[0]) if len(unclear) else len(answer)


def as_served(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of an answer as servers give it: without special tokens, and without blanks around it."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()
