"""Choose where an export is compared with training: positions of answers, and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.examples import Example
from loratune.data.prompts import render_prompts
from loratune.data.rows.conversation import Conversation
from loratune.data.rows.row import Origin
from loratune.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

MAX_POSITIONS = 512
"""The most positions at which distributions are compared: 0.3 GB of log-probabilities for a vocabulary of 150,000."""
ENOUGH_POSITIONS = 64
"""Positions of held-out answers from which no training examples are added."""
POSITIONS_PER_EXAMPLE = 32
MAX_PROMPTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A conversation up to its last answer, with the token ids that training gives it."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    input_ids: list[int]


def choose_examples(held_out: Sequence[Example], training: Sequence[Example] = ()) -> tuple[list[Example], str]:
    """Choose the positions to compare: evenly over each example's supervised tokens, including the first and last.

    Args:
        held_out: Held-out examples.
        training: Training examples, which are added where the held-out ones have fewer than `ENOUGH_POSITIONS`.

    Returns:
        The examples, cut after their last chosen position, with only the chosen tokens supervised; and where they are
        from: `held-out`, `training` or `held-out and training`.
    """
    chosen = _choose(held_out, MAX_POSITIONS)
    found = sum(int(example.supervised.sum()) for example in chosen)
    # Of a run whose training files are gone, the held-out rows stand in for them.
    known = {example.origin for example in held_out}
    others = [example for example in training if example.origin not in known]
    added = _choose(others, MAX_POSITIONS - found) if found < ENOUGH_POSITIONS else []
    return chosen + added, sides_of(chosen, added)


def sides_of(held_out: Sequence[object], training: Sequence[object]) -> str:
    """Return where examples are from: `held-out`, `training` or `held-out and training`."""
    return " and ".join(name for name, examples in (("held-out", held_out), ("training", training)) if examples)


def _choose(examples: Sequence[Example], left: int) -> list[Example]:
    chosen: list[Example] = []
    for example in examples:
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
    """Return prompts for the last answers of held-out conversations, as training renders them.

    Without held-out conversations the template is tried on one of our own, if it accepts it.
    """
    questions: list[Question] = []
    for conversation in conversations:
        questions += _questions(conversation, tokenizer)
        if len(questions) == limit:
            break
    if questions or not tokenizer.chat_template:
        return questions
    texts = (("user", "What is the capital of France?"), ("assistant", "Paris."), ("user", "And of Italy?"))
    messages = tuple({"role": role, "content": text} for role, text in (*texts, ("assistant", "Rome.")))
    own = Conversation(messages=messages, tools=None, text=None, origin=Origin(file="certificate", line=1))
    try:
        return _questions(own, tokenizer)
    except DataError:
        return []


def _questions(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    found = []
    for prompt in render_prompts([conversation], tokenizer):
        roles = [message["role"] for message in conversation.messages]
        turn = len(roles) - 1 - roles[::-1].index("assistant")
        found.append(
            Question(messages=conversation.messages[:turn], tools=conversation.tools, input_ids=prompt.input_ids)
        )
    return found
