"""What a server would send, and what ends the answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example
from loratune.data.masking.render import Rendered
from loratune.data.prompts import render_prompts, stop_token_ids
from loratune.data.rows.conversation import Conversation
from tests.data.golden import CHAT, GOLDEN, R1_ANSWER, SMOLLM2, assistant, user

Make = Callable[..., Conversation]
WithTemplate = Callable[..., PreTrainedTokenizerBase]
Render = Callable[..., Rendered]
Trained = Callable[[Example, PreTrainedTokenizerBase], list[str]]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_prompt_and_what_is_trained_after_it_are_the_whole_conversation(
    name: str, with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    template, tokens, _, whole = GOLDEN[name]
    tokenizer = with_template(template, **tokens)
    conversation = converse(*CHAT)

    (prompt,) = render_prompts([conversation], tokenizer)
    (example,) = rendered([conversation], tokenizer, train_on="last").examples

    opened = prompt.text.removesuffix("<think>\n")  # R1's prompt opens thoughts that this answer does not have
    assert whole.startswith(opened + trained_texts(example, tokenizer)[0])
    assert prompt.references == ("10, of course.",)
    assert prompt.input_ids == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    assert prompt.input_ids == tokenizer.apply_chat_template(
        list(CHAT[:3]), add_generation_prompt=True, return_dict=False
    )


def test_the_stop_tokens_are_the_templates_and_the_end_of_sequence_token(with_template: WithTemplate) -> None:
    tokenizer = with_template("phi3", eos="<|endoftext|>")
    assert tokenizer.convert_ids_to_tokens(list(stop_token_ids(tokenizer))) == ["<|end|>", "<|endoftext|>"]

    tokenizer = with_template("gptoss", eos="<|return|>")
    assert tokenizer.convert_ids_to_tokens(list(stop_token_ids(tokenizer))) == ["<|return|>", "<|call|>"]


def test_prompts_follow_the_policy_on_earlier_thoughts(with_template: WithTemplate, converse: Make) -> None:
    tokenizer = with_template(SMOLLM2)
    conversation = converse(user("5 doubled?"), assistant(R1_ANSWER), user("Again?"), assistant(R1_ANSWER))

    (kept,) = render_prompts([conversation], tokenizer)
    (stripped,) = render_prompts([conversation], tokenizer, thinking="strip")

    assert "Five times two" in kept.text
    assert "Five times two" not in stripped.text
    assert kept.references == stripped.references == ("10.",)
