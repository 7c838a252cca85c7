"""`train_on` by role: what is trained of every template that TRL bundles, or why it is refused.

`role_outcomes.json` lists, for each template and each role, the trained strings of `CONVERSATION`, or why the row is
rejected. It is read by people: read a line before you change it. A text whose end is not trained has no stop token of
its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example
from loratune.data.masking.render import Rendered
from loratune.data.prepare import prepare_data
from loratune.data.rows.conversation import Conversation
from loratune.data.stream import open_tables, stream_data
from loratune.recipe.recipe import DataSection, Recipe
from loratune.recipe.roles import roles_in_words
from loratune.run.errors import DataError, RecipeError
from loratune.run.progress import NoProgress
from tests.conftest import write_jsonl
from tests.data.golden import CHAT, GOLDEN, MISTRAL_SYSTEM_LAST, SMOLLM2, assistant, rejection, user
from tests.data.masking.test_templates import CALL, CASES, NAMES, TOOLS, outcome

Make = Callable[..., Conversation]
WithTemplate = Callable[..., PreTrainedTokenizerBase]
Render = Callable[..., Rendered]
Trained = Callable[[Example, PreTrainedTokenizerBase], list[str]]

OUTCOMES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("role_outcomes.json").read_text("utf-8"))
ROLES = ("system", "user", "tool")
FEW = (
    "deepseekv3",
    "gemma4_v2",
    "glm4moe_training",
    "gptoss",
    "llama3_1",
    "llava_next",
    "qwen2_5",
    "qwen3_5_think_training",
)
"""Those of the default suite, one for each way of writing roles; the others take their turn with `-m slow`."""
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "18 C"}
CONVERSATION = [
    SYSTEM,
    user("Weather? "),
    assistant(None, tool_calls=[CALL]),
    TOOL,
    assistant("It is warm."),
    user("Bye"),
    assistant("So long"),
    user("Still there?"),
]
"""With a call that is an answer without a text, a message with a blank at its end, and one without an answer."""


def for_template(role: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation without what this template refuses: tools or a system message, unless they are what is asked
    for."""
    left_out = {part for part in ("system", "tool") if part in found.get("without", ()) and part != role}
    return [m for m in CONVERSATION if m["role"] not in left_out and not ("tool" in left_out and m.get("tool_calls"))]


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_template_trains_what_is_listed_of_a_role_or_is_refused_as_listed(
    name: str, with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer, listed = with_template(name), OUTCOMES[name]
    texts = {m["content"].strip(): m["role"] for m in CONVERSATION if m["content"]}
    for role in ROLES:
        messages = for_template(role, listed)
        made = converse(*messages, tools=None if "tool" in listed.get("without", ()) and role != "tool" else TOOLS)
        found = outcome(made, tokenizer, rendered, trained_texts, train_on=(role,))
        assert found == listed[role], role
        if isinstance(found, str):
            assert re.search("chat template|tokenizer", found)
            continue
        wanted = [m["content"].strip() for m in messages if m["role"] == role]
        assert len(found) == len(wanted)
        for text, content in zip(found, wanted, strict=True):
            assert text.lstrip().startswith(content)
            assert not any(other in text for other, whose in texts.items() if whose != role or other != content)
            assert len(text) < len(content) + 60


def test_every_template_of_trl_is_listed() -> None:
    assert sorted(OUTCOMES) == NAMES
    trained = [role for found in OUTCOMES.values() for role in ROLES if isinstance(found[role], list)]
    assert trained.count("user") >= 60, "a template that refuses everything would pass the test above"


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_the_role_of_answers_is_assistant_token_for_token_and_roles_add_up(
    name: str, with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    tokenizer = with_template(name)
    for row in CASES.values():
        made = converse(*row["messages"], tools=row.get("tools"))
        word, roles, users, both = (
            _masks(made, tokenizer, rendered, train_on) for train_on in ("assistant", ("assistant",), ("user",), ("user", "assistant"))  # noqa: E501
        )  # fmt: skip
        assert type(word) is type(roles)
        if isinstance(word, str):
            assert word == roles
            continue
        assert all(np.array_equal(one, other) for one, other in zip(word, roles, strict=True))
        if isinstance(users, str):
            assert isinstance(both, str)
        else:
            assert np.array_equal(both[0], word[0])
            assert not (both[1] < word[1]).any()
            if len(users[0]) == len(word[0]):  # thoughts are put back where answers are trained
                assert np.array_equal(both[1], users[1] | word[1])
                assert not (users[1] & word[1]).any()


def _masks(made: Conversation, tokenizer: PreTrainedTokenizerBase, rendered: Render, train_on: Any) -> Any:
    try:
        result = rendered([made], tokenizer, train_on=train_on)
    except DataError as error:
        return error.problem
    if result.rejected:
        return result.rejected[0].reason
    return result.examples[0].input_ids, result.examples[0].supervised


# ---- by hand

USERS = {
    "smollm2": ["What is 2 + 3?<|im_end|>", "And doubled?<|im_end|>"],
    "qwen2.5": ["What is 2 + 3?<|im_end|>", "And doubled?<|im_end|>"],
    "qwen3": ["What is 2 + 3?<|im_end|>", "And doubled?<|im_end|>"],
    "llama3": ["What is 2 + 3?<|eot_id|>", "And doubled?<|eot_id|>"],
    "gemma": ["What is 2 + 3?<end_of_turn>", "And doubled?<end_of_turn>"],
    "r1-distill": ["What is 2 + 3?", "And doubled?"],
    "phi3": ["What is 2 + 3?<|end|>", "And doubled?<|end|>"],
    "mistral": [" What is 2 + 3? [/INST]", " And doubled? [/INST]"],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_a_user_would_write_is_trained_and_no_token_changes(
    name: str, with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    template, tokens, answers, whole = GOLDEN[name]
    tokenizer = with_template(template, **tokens)
    result = rendered([converse(*CHAT)], tokenizer, train_on=("user",))
    both = rendered([converse(*CHAT)], tokenizer, train_on=("assistant", "user")).examples[0]
    assert trained_texts(result.examples[0], tokenizer) == USERS[name]
    assert tokenizer.decode(result.examples[0].input_ids) == tokenizer.decode(both.input_ids) == whole
    expected = [text for pair in zip(USERS[name], answers, strict=True) for text in pair]
    if name != "mistral":  # where a trained user text touches the answer to it
        assert trained_texts(both, tokenizer) == expected
    assert "".join(trained_texts(both, tokenizer)) == "".join(expected)
    assert result.counts["verified"] == 1
    assert result.counts["trained user"] == 2
    told = any("writes 2 messages of user without a stop token" in notice for notice in result.notices)
    assert told == (name == "r1-distill")


def test_texts_that_a_template_writes_elsewhere_are_found_there(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template(MISTRAL_SYSTEM_LAST, bos="<s>", eos="</s>")
    conversation = converse(SYSTEM, *CHAT)
    texts = {
        role: trained_texts(rendered([conversation], tokenizer, train_on=(role,)).examples[0], tokenizer)
        for role in ("system", "user")
    }
    assert texts == {"system": [" Be brief."], "user": [" What is 2 + 3?[/INST]", "And doubled?[/INST]"]}


def test_of_two_results_in_one_turn_the_second_ends_it(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template("qwen2_5")
    other = {**TOOL, "content": "19 C"}
    conversation = converse(
        user("Weather?"), assistant(None, tool_calls=[CALL, CALL]), TOOL, other, assistant("Warm."), tools=TOOLS
    )
    result = rendered([conversation], tokenizer, train_on=("tool",))
    assert trained_texts(result.examples[0], tokenizer) == ["18 C", "19 C\n</tool_response><|im_end|>"]
    assert result.counts["without_stop_token tool"] == 1


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "qwen3"])
def test_thoughts_that_are_put_back_shift_no_other_span(
    template: str, with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template(template, eos="<|im_end|>")
    chat = [
        user("one?"),
        assistant("<think>\nHm.\n</think>\n\n1."),
        user("two?"),
        assistant("<think>\nHm hm.\n</think>\n\n2."),
        user("three?"),
    ]
    result = rendered([converse(*chat)], tokenizer, train_on=("user", "assistant"))
    assert not result.rejected, result.rejected
    assert result.counts["thoughts_restored"] >= 1
    trained = "".join(trained_texts(result.examples[0], tokenizer))
    assert [trained.count(text) for text in ("one?", "Hm.", "1.", "two?", "Hm hm.", "2.", "three?")] == [1] * 7
    users = rendered([converse(*chat)], tokenizer, train_on=("user",)).examples[0]
    assert [text.removesuffix("<|im_end|>") for text in trained_texts(users, tokenizer)] == ["one?", "two?", "three?"]


def test_texts_that_read_like_others_and_like_the_template_are_told_apart(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template(SMOLLM2)
    chat = [user("user"), assistant("user"), user("user"), assistant("assistant\n"), user("end"), assistant("|im_end|")]
    (example,) = rendered([converse(*chat)], tokenizer, train_on=("user",)).examples
    assert trained_texts(example, tokenizer) == ["user<|im_end|>", "user<|im_end|>", "end<|im_end|>"]
    context = tokenizer.decode(example.input_ids[~example.supervised])
    assert context.count("<|im_start|>user\n\n") == 3


# ---- what rows say of themselves


def test_a_message_of_any_trained_role_can_be_left_out(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template(SMOLLM2)
    chat = [{**message, "train": False} if n in (0, 3) else message for n, message in enumerate(CHAT)]
    result = rendered([converse(*chat)], tokenizer, train_on=("user", "assistant"))
    assert trained_texts(result.examples[0], tokenizer) == ["It is 5.<|im_end|>", "And doubled?<|im_end|>"]
    assert "2 messages have train: false and are not trained." in result.notices
    (users,) = rendered([converse(*chat)], tokenizer, train_on=("user",)).examples
    assert trained_texts(users, tokenizer) == ["And doubled?<|im_end|>"]
    nothing = [{**message, "train": False} for message in CHAT]
    assert (
        rejection(rendered([converse(*nothing)], tokenizer, train_on=("user",)))
        == "no message of user: nothing to train"
    )


def test_a_message_that_wants_to_be_trained_and_is_not_is_refused(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    tokenizer = with_template(SMOLLM2)
    conversation = converse({**CHAT[0], "train": True}, *CHAT[1:])
    assert rejection(rendered([conversation], tokenizer)) == (
        "message 1 (user) has train true, but data.train_on is assistant, which does not train it"
    )
    assert len(rendered([conversation], tokenizer, train_on=("user",)).examples) == 1
    assert len(rendered([conversation], tokenizer, train_on="all").examples) == 1


def test_a_text_that_the_template_drops_or_that_has_no_place_is_refused(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    dropping = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    dropping += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    shouting = SMOLLM2.replace("+ message['content'] +", "+ message['content'] | replace('brief', 'short') +")
    for template, reason in ((dropping, r"drops the text of message 1 \(system\)"), (shouting, "changes")):
        result = rendered([converse(SYSTEM, *CHAT)], with_template(template), train_on=("system", "user"))
        assert re.search(reason, rejection(result))
    empty = rendered([converse(SYSTEM, user(""), user("Hi"))], with_template(SMOLLM2), train_on=("system",))
    assert "where message 1 (system) ends is ambiguous" in rejection(empty)


def test_a_template_that_looks_into_a_text_makes_the_two_ways_disagree(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    """Which message it shows depends on the text of another: with another text in its place, everything after it
    moves."""
    nosy = SMOLLM2.replace(
        "{{'<|im_start|>' +", "{% if messages[0]['content'][:2] == 'Hi' %}{{ '!' }}{% endif %}{{'<|im_start|>' +"
    )
    result = rendered([converse(user("Hi"), assistant("Hello."))], with_template(nosy), train_on=("user",))
    assert "cannot be followed" in rejection(result)


# ---- recipes


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "empty list"),
        (["user", "user"], "user is named twice"),
        (["king"], "train_on is"),
        ("user", "train_on is"),
    ],
)
def test_what_is_no_list_of_roles_is_refused(value: Any, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        Recipe.parse({"data": {"train_on": value}})


def _rows(folder: Path, *rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(folder / "rows.jsonl", [{"messages": row} for row in rows])


def test_a_role_that_nobody_has_is_an_error_and_of_a_sample_a_warning(
    smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = _rows(tmp_path, *[[user(f"Hi {n}"), assistant("Hello.")] for n in range(12)])
    section = DataSection.model_validate({"train": str(rows), "eval": "none", "train_on": ["assistant", "tool"]})
    with pytest.raises(DataError, match="names the role tool, which no message") as caught:
        prepare_data(section, smollm2_tokenizer, max_length=512, seed=0)
    assert caught.value.place == f"{rows}:1"
    assert caught.value.fix == "the data has the roles user, assistant: data.train_on=[assistant]"
    streamed = stream_data(
        section, open_tables(section, NoProgress()), smollm2_tokenizer, max_length=512, seed=0, progress=NoProgress()
    )
    assert any(
        "names the role tool, which no message of the training data has, as far" in n
        for n in streamed.report["notices"]
    )


def test_streamed_rows_are_trained_alike(smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = _rows(tmp_path, *[[user(f"Hi {n}"), assistant("Hello.")] for n in range(12)])
    section = DataSection.model_validate({"train": str(rows), "eval": "none", "train_on": ["user"]})
    expected = prepare_data(section, smollm2_tokenizer, max_length=512, seed=0).train
    tables = open_tables(section, NoProgress())
    streamed = stream_data(section, tables, smollm2_tokenizer, max_length=512, seed=0, progress=NoProgress()).stream
    assert streamed is not None
    for number, example in enumerate(expected):
        made = streamed[number]
        assert isinstance(made, Example)
        assert made.supervised.tolist() == example.supervised.tolist()


def test_the_report_counts_trained_messages_and_rows_without_one_are_bad_rows(
    smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = _rows(tmp_path, [user("Hi"), assistant("Hello."), user("Bye")], [assistant("I begin.")], [user("Hm")])
    section = DataSection.model_validate(
        {"train": str(rows), "eval": "none", "train_on": ["user"], "on_bad_row": "skip"}
    )
    prepared = prepare_data(section, smollm2_tokenizer, max_length=512, seed=0)
    part = prepared.report["train"]
    assert part["trained_messages"] == {"user": 3}
    assert part["trained_messages_without_stop_token"] == {}
    assert [row["reason"] for row in part["rejected"]] == ["no message of user: nothing to train"]
    assert "another text in a message's place" in prepared.report["mask"]["method"]
    assert part["conversations_without_last_answer"] == 0, "a message that is trained needs no answer"
    section = section.model_copy(update={"on_bad_row": "error"})
    with pytest.raises(DataError, match="no message of user") as caught:
        prepare_data(section, smollm2_tokenizer, max_length=512, seed=0)
    assert caught.value.place == f"{rows}:2"


def test_it_is_said_in_words() -> None:
    assert roles_in_words(["user", "tool"]) == "all messages of user and tool"
    assert roles_in_words("last") == "the last answer"
