"""Whether training and serving prompt the model alike: the tokens before trained answers vs. a server's prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.masking.template import ChatTemplate
from loratune.data.prompts import render_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.data.masking.policy import Thinking
    from loratune.data.rows.conversation import Conversation
    from loratune.data.rows.row import Origin

PROMPTS_CHECKED = 64
"""Conversations whose prompt is compared with what was trained, spread evenly over the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCheck:
    """The tokens before trained answers, compared with those that a server would send.

    Attributes:
        checked: Number of conversations compared.
        header: How many differ in what starts the answer.
        history: How many differ earlier, such as in the thoughts of earlier answers.
        boundary: How many have the same text in other tokens: the tokenizer joins the prompt's end with the answer's
            start.
        origin: The first conversation that differs in text.
        trained: Its text in training, from the first difference on.
        served: What a server would send instead.
    """

    checked: int = 0
    header: int = 0
    history: int = 0
    boundary: int = 0
    origin: Origin | None = None
    trained: str = ""
    served: str = ""

    def as_record(self) -> dict[str, Any]:
        """Return the check as `data.json` holds it."""
        place = {} if self.origin is None else self.origin.as_record()
        counts = {
            "checked": self.checked,
            "header_differs": self.header,
            "history_differs": self.history,
            "boundary_differs": self.boundary,
        }
        return {**counts, **place, "trained": self.trained, "served": self.served}


def compare_with_prompts(
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: Thinking,
) -> PromptCheck:
    """Compare, for a sample, the prompt of the last answer as a server would send it with the tokens in training.

    Args:
        examples: The examples made of the conversations.
        conversations: The conversations, including those that became no example.
        tokenizer: The tokenizer of the base model.
        thinking: The recipe's `data.thinking`.
    """
    by_origin = {example.origin: example for example in examples}
    asked = [c for c in conversations if c.messages and c.messages[-1]["role"] == "assistant" and c.origin in by_origin]
    asked = asked[:: max(1, len(asked) // PROMPTS_CHECKED)][:PROMPTS_CHECKED]
    if not asked:
        return PromptCheck()
    header = len(tokenizer(ChatTemplate(tokenizer).header, add_special_tokens=False)["input_ids"])
    checked, counts, first = 0, Counter[str](), PromptCheck()
    for prompt in render_prompts(asked, tokenizer, thinking=thinking):
        trained, served = by_origin[prompt.origin].input_ids, np.array(prompt.input_ids)
        if len(trained) <= len(served):  # cut before its last answer
            continue
        checked += 1
        differs = np.flatnonzero(trained[: len(served)] != served)
        if not len(differs):
            continue
        at = int(differs[0])
        shown = slice(max(0, at - 1), at + 12)
        texts = str(tokenizer.decode(trained[shown])), str(tokenizer.decode(served[shown]))
        if texts[0].startswith(texts[1]) and not texts[1].rstrip().endswith("<think>"):
            counts["boundary"] += 1
            continue
        if first.origin is None:
            first = PromptCheck(origin=prompt.origin, trained=texts[0], served=texts[1])
        counts["header" if at >= len(served) - header else "history"] += 1
    return replace(
        first, checked=checked, header=counts["header"], history=counts["history"], boundary=counts["boundary"]
    )


def shared_prompts(train: Sequence[Conversation], evaluation: Sequence[Conversation]) -> list[tuple[Origin, Origin]]:
    """Find held-out conversations whose messages before the last answer also occur in the training data.

    Those that occur there with the same answer are left out: `overlap` in the data report lists them.

    Returns:
        Where each held-out conversation and its training conversation were read.
    """
    if not evaluation:
        return []
    prompts: dict[str, tuple[Origin, set[str]]] = {}
    for conversation in train:
        if conversation.messages:
            prompt, answer = _prompt_and_answer(conversation)
            prompts.setdefault(prompt, (conversation.origin, set()))[1].add(answer)
    shared = []
    for conversation in evaluation:
        if conversation.messages:
            prompt, answer = _prompt_and_answer(conversation)
            origin, answers = prompts.get(prompt, (None, set[str]()))
            if origin is not None and answer not in answers:
                shared.append((conversation.origin, origin))
    return shared


def _prompt_and_answer(conversation: Conversation) -> tuple[str, str]:
    *prompt, answer = conversation.messages
    return repr([(message["role"], message.get("content")) for message in prompt]), repr(answer)
