"""Answers that say `train: false`: context, in every template, and in both ways of finding what is trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.cache_entry import from_arrays, to_arrays
from loratune.data.examples import Example
from loratune.data.masking.render import Rendered
from loratune.data.prepare import prepare_data
from loratune.data.prompts import render_prompts
from loratune.data.rows.conversation import Conversation
from loratune.data.rows.formats import to_conversations
from loratune.data.rows.row import Row
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import DataSection, Recipe
from loratune.run.progress import NoProgress
from tests.conftest import conversation, write_jsonl
from tests.data.golden import CHAT, GOLDEN, SMOLLM2

Make = Callable[..., Conversation]
WithTemplate = Callable[..., PreTrainedTokenizerBase]
Render = Callable[..., Rendered]
Trained = Callable[[Example, PreTrainedTokenizerBase], list[str]]
ANSWERS = [number for number, message in enumerate(CHAT) if message["role"] == "assistant"]


def without(*numbers: int, **said: object) -> list[dict[str, object]]:
    """The chat of the golden examples, where these answers are not to be trained."""
    said = said or {"train": False}
    return [{**message, **(said if n in numbers else {})} for n, message in enumerate(CHAT)]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_other_answers_are_trained_and_no_token_changes(
    name: str, with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    template, tokens, trained, whole = GOLDEN[name]
    tokenizer = with_template(template, **tokens)
    for skipped, number in enumerate(ANSWERS):
        result = rendered([converse(*without(number))], tokenizer)
        (example,) = result.examples
        assert trained_texts(example, tokenizer) == [text for n, text in enumerate(trained) if n != skipped]
        assert tokenizer.decode(example.input_ids) == whole
        assert result.counts["verified"] == 1
        assert result.counts["answers_not_trained"] == 1
        assert "1 answer has train: false and is not trained." in result.notices
    (last,) = rendered([converse(*without(ANSWERS[-1]))], tokenizer, train_on="last").examples
    assert trained_texts(last, tokenizer) == trained[-2:-1], "the last one that is trained"


def test_earlier_answers_of_gpt_oss_can_be_left_out_row_by_row(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template("gptoss", eos="<|return|>")
    (example,) = rendered([converse(*without(*ANSWERS[:-1]))], tokenizer).examples
    assert trained_texts(example, tokenizer) == ["<|channel|>final<|message|>10, of course.<|return|>"]


def test_a_system_message_of_the_row_does_not_shift_which_answer_it_is(
    with_template: WithTemplate, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template(SMOLLM2)
    value = {"messages": without(ANSWERS[0], weight=0), "system": "Be brief."}
    (made,), _ = to_conversations([Row(file="f", line=1, value=value)], "messages")
    assert made.messages[0]["role"] == "system"
    assert made.excluded == (ANSWERS[0] + 1,)
    assert not any("train" in message or "weight" in message for message in made.messages)
    (example,) = rendered([made], tokenizer).examples
    assert trained_texts(example, tokenizer) == ["10, of course.<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (without(ANSWERS[0], train="no"), 'has train str "no"; it must be true or false'),
        (without(ANSWERS[0], weight=0.5), r"has weight float 0\.5; it must be true or false"),
    ],
)
def test_what_cannot_be_followed_is_refused(messages: list[dict[str, object]], why: str) -> None:
    _, (rejected,) = to_conversations([Row(file="f", line=1, value={"messages": messages})], "messages")
    assert re.search(why, rejected.reason), rejected.reason


def test_all_tokens_and_none_are_refused_with_a_reason(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    tokenizer = with_template(SMOLLM2)
    (everything,) = rendered([converse(*without(ANSWERS[0]))], tokenizer, train_on="all").rejected
    assert everything.reason == (
        "message 2 (assistant) has train false, but data.train_on is all, which trains every token"
    )
    (nothing,) = rendered([converse(*without(*ANSWERS))], tokenizer).rejected
    assert nothing.reason == "no assistant turn: nothing to train"


def test_evaluation_asks_for_the_last_answer_that_is_trained(with_template: WithTemplate, converse: Make) -> None:
    tokenizer = with_template(SMOLLM2)
    (prompt,) = render_prompts([converse(*without(ANSWERS[-1]))], tokenizer)
    (expected,) = render_prompts([converse(*CHAT[: ANSWERS[0] + 1])], tokenizer)
    assert (prompt.input_ids, prompt.references) == (expected.input_ids, expected.references)


def test_the_plan_counts_them_and_the_cache_keeps_them(
    tiny_recipe: Callable[..., Recipe], smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [conversation(3 * i) for i in range(6)]  # of two turns
    for row in rows[:4]:
        row["messages"][1]["train"] = False  # type: ignore[index]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tiny_recipe(data__train=str(file), data__eval=str(file)), NoProgress())
    assert prepared.data.report["train"]["answers_not_trained"] == 4
    assert any("4 answers have train: false" in notice for notice in prepared.notes.warnings)
    data = prepare_data(
        DataSection(train=str(file), eval=str(file)),
        smollm2_tokenizer,
        max_length=512,
        seed=0,  # type: ignore[arg-type]
    )
    arrays = to_arrays(data)
    assert arrays is not None
    assert [c.excluded for c in from_arrays(arrays).eval_conversations] == [(1,)] * 4 + [()] * 2
