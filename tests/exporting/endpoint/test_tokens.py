"""Log-probabilities as servers write them."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.exporting.endpoint.tokens import TokenTexts, generated_top, prompt_tops
from loratune.workflows.tiny_model import byte_tokenizer


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(byte_tokenizer())


def id_of(letter: str) -> int:
    (found,) = byte_tokenizer()(letter, add_special_tokens=False)["input_ids"]
    return int(found)


@pytest.mark.parametrize(
    "logprobs",
    [
        {"top_logprobs": [{"a": -0.5, "b": -1.5}]},
        {"top_logprobs": [{f"token_id:{id_of('a')}": -0.5, f"token_id:{id_of('b')}": -1.5}]},
        {
            "content": [
                {"id": id_of("a"), "logprob": -0.5, "top_logprobs": [{"id": id_of("b"), "token": "?", "logprob": -1.5}]}
            ]
        },
        {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.5}]}]},
    ],
)
def test_every_form_is_read_as_token_ids(texts: TokenTexts, logprobs: dict[str, Any]) -> None:
    assert generated_top({"logprobs": logprobs}, texts) == {id_of("a"): -0.5, id_of("b"): -1.5}


def test_a_text_that_several_tokens_have_means_none(texts: TokenTexts) -> None:
    assert texts.id_of("�") is None
    assert texts.id_of("no token") is None
    assert generated_top({"logprobs": {"top_logprobs": [{"�": -0.5, "a": -2.0}]}}, texts) == {id_of("a"): -2.0}
    assert generated_top({"logprobs": {"top_logprobs": [{"�": -0.5}]}}, texts) is None


@pytest.mark.parametrize(
    "choice", [{}, {"logprobs": None}, {"logprobs": {"content": []}}, {"logprobs": {"tokens": []}}]
)
def test_without_log_probabilities_there_are_none(texts: TokenTexts, choice: dict[str, Any]) -> None:
    assert generated_top(choice, texts) is None
    assert prompt_tops(choice, 2, texts) is None


def test_the_tokens_of_a_prompt_are_read_in_their_places(texts: TokenTexts) -> None:
    own = {"prompt_logprobs": [None, {"5": {"logprob": -1.0, "rank": 1}}]}
    assert prompt_tops(own, 2, texts) == [None, {5: -1.0}]
    assert prompt_tops(own, 3, texts) is None
    echoed = {"logprobs": {"top_logprobs": [None, {"a": -1.0}, {"b": -2.0}]}}
    assert prompt_tops(echoed, 2, texts) == [None, {id_of("a"): -1.0}]
