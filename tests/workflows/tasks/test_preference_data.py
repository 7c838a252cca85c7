"""Pairs of answers from the shapes that files have: read by one rule, verified, and accounted for."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example, PairExample
from loratune.data.prepared import PreparedData
from loratune.data.preview import preview
from loratune.data.rows.row import Origin, Row
from loratune.evaluation.scoring import score
from loratune.recipe.recipe import DataSection, PreferenceSection, Recipe
from loratune.run.errors import DataError
from loratune.run.records.data import DataRecord
from loratune.workflows.guidance.init import init
from loratune.workflows.tasks.preference.data import prepare_preferences
from loratune.workflows.tasks.preference.kinds import _prompt_difference
from loratune.workflows.tasks.preference.rows import to_pairs
from loratune.workflows.tasks.task import task_named
from tests.conftest import write_jsonl

USER, GOOD, BAD = "Rain?", "Yes, bring an umbrella.", "No."


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def human(content: str) -> dict[str, str]:
    return {"from": "human", "value": content}


def gpt(content: str) -> dict[str, str]:
    return {"from": "gpt", "value": content}


ASKED, CHOSEN, REJECTED = said("user", USER), said("assistant", GOOD), said("assistant", BAD)
TALK = [said("user", "Hi."), said("assistant", "Hello."), ASKED]

SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    "question": {"question": USER, "chosen": GOOD, "rejected": BAD},
    "alpaca": {"instruction": USER, "input": "", "chosen": GOOD, "rejected": BAD},
    "prompt of messages": {"prompt": [ASKED], "chosen": [CHOSEN], "rejected": [REJECTED]},
    "prompt and texts": {"prompt": [ASKED], "chosen": GOOD, "rejected": BAD},
    "single messages": {"prompt": [ASKED], "chosen": CHOSEN, "rejected": REJECTED},
    "whole conversations": {"chosen": [ASKED, CHOSEN], "rejected": [ASKED, REJECTED]},
    "prompt, and whole conversations": {"prompt": USER, "chosen": [ASKED, CHOSEN], "rejected": [ASKED, REJECTED]},
    "JSON in a table": {"chosen": json.dumps([ASKED, CHOSEN]), "rejected": json.dumps([ASKED, REJECTED])},
    "ShareGPT": {"conversations": [human(USER)], "chosen": gpt(GOOD), "rejected": gpt(BAD)},
    "ms-swift": {"messages": [ASKED, CHOSEN], "rejected_response": BAD},
    "OpenAI": {"input": {"messages": [ASKED]}, "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]},
}


def read(value: Any) -> Any:
    found = to_pairs([Row(file="a.jsonl", line=1, value=value)])
    return found.items[0] if found.items else found.rejected[0].reason


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_pair(shape: str) -> None:
    pair = read(SHAPES[shape])
    assert [*pair.chosen.messages] == [ASKED, CHOSEN]
    assert [*pair.rejected.messages] == [ASKED, REJECTED]
    assert pair.key == read(SHAPES["texts"]).key


@pytest.mark.parametrize(
    "answer",
    [
        '{"from":"berlin","to":"paris"}',
        '[{"name":"a"}]',
        "[]",
        '{"role":"manager","level":3}',
        '{"role":"assistant","content":"hello"}',
        '{"urgent":true,"urgent":false}',
        '[{"a":1,"a":2}]',
    ],
)
def test_an_answer_that_is_json_is_a_text(answer: str) -> None:
    pair = read({"prompt": answer, "chosen": answer, "rejected": "[1]"})
    assert [message["content"] for message in pair.chosen.messages] == [answer, answer]
    assert pair.rejected.messages[-1]["content"] == "[1]"


def test_answers_of_the_shared_beginning_are_context_and_later_ones_are_trained() -> None:
    ending = [said("user", "Sure?"), said("assistant", "Sure.")]
    pair = read({"chosen": [*TALK, CHOSEN, *ending], "rejected": [*TALK, REJECTED, *ending]})
    assert pair.chosen.given == pair.rejected.given == (1,)
    assert len(pair.chosen.messages) == 6
    system = {"system": "Be brief.", "prompt": TALK, "chosen": GOOD, "rejected": BAD}
    assert read(system).rejected.messages[0] == said("system", "Be brief.")
    assert read({"prompt": [said("system", "Be brief."), ASKED], "chosen": [ASKED, CHOSEN], "rejected": BAD}).key == (
        read({"system": "Be brief.", "prompt": USER, "chosen": GOOD, "rejected": BAD}).key
    )


def test_earlier_answers_of_a_sharegpt_conversation_are_context() -> None:
    asked = [human("Name a fruit."), gpt("Small or large?"), human("Small.")]
    pair = read({"conversations": asked, "chosen": gpt("A cherry."), "rejected": gpt("No.")})
    assert pair.chosen.given == pair.rejected.given == pair.chosen.excluded == (1,)
    assert [message["content"] for message in pair.rejected.messages[2:]] == ["Small.", "No."]


def test_an_answer_that_the_prompt_starts_goes_on() -> None:
    pair = read({"prompt": [ASKED, said("assistant", "Well, ")], "chosen": GOOD, "rejected": BAD})
    assert pair.chosen.messages[-1]["content"] == f"Well, {GOOD}"
    assert pair.chosen.started == pair.rejected.started == (1, "Well, ")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": USER, "chosen": GOOD, "rejected": ""}, "rejected is empty, and chosen is not"),
        ({"prompt": USER, "chosen": "  ", "rejected": BAD}, "chosen is empty"),
        ({"prompt": [ASKED], "chosen": [CHOSEN], "rejected": [said("assistant", "")]}, "rejected"),
        ({"prompt": USER, "chosen": GOOD, "rejected": GOOD}, "chosen and rejected are the same"),
        ({"chosen": GOOD, "rejected": BAD}, "chosen is an answer without a prompt"),
        (
            {"prompt": USER, "completion": GOOD, "label": True},
            "are for preference.loss=kto",
        ),
        ({"messages": TALK}, "no chosen and rejected among fields messages"),
        ({"prompt": USER, "chosen": 3, "rejected": BAD}, "chosen is int 3, neither text nor messages"),
        ({"chosen": [ASKED, CHOSEN], "rejected": [said("user", "Snow?"), REJECTED]}, "the prompts of chosen and rej"),
        ({"chosen": [ASKED, CHOSEN], "rejected": [ASKED, CHOSEN, ASKED, REJECTED]}, "chosen has no answer of its own"),
        ({"prompt": "Snow?", "chosen": [ASKED, CHOSEN], "rejected": [ASKED, REJECTED]}, "does not begin with the mes"),
        ({"messages": [ASKED], "rejected_response": BAD}, "messages do not end with the chosen answer"),
        ("text", "a row must be an object"),
    ],
)
def test_what_is_no_pair_is_refused_with_the_reason(row: Any, reason: str) -> None:
    assert re.search(reason, read(row)), read(row)


def test_fields_that_are_not_read_are_named_once() -> None:
    row = {**SHAPES["texts"], "score_chosen": 9.5, "messages": TALK}
    found = to_pairs([Row(file="a.jsonl", line=n, value=row) for n in (1, 2)])
    assert found.unread == Counter({("column", "score_chosen"): 2, ("column", "messages"): 2})


# ---- tokens


def prepared(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], **settings: Any) -> PreparedData:
    max_length = settings.pop("max_length", 400)
    file = write_jsonl(folder / "pairs.jsonl", rows)
    section = DataSection.model_validate({"train": str(file), "eval": "none", **settings})
    data = prepare_preferences(PreferenceSection(), section, tokenizer, max_length=max_length, seed=1)
    DataRecord.model_validate_json(json.dumps(data.report))
    return data


def decoded(tokenizer: PreTrainedTokenizerBase, example: Any) -> list[str]:
    assert isinstance(example, PairExample)
    return [str(tokenizer.decode(part.input_ids[part.supervised])) for part in example.sequences]


def test_both_answers_are_trained_with_their_stop_token_and_nothing_else(
    tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [SHAPES["texts"], {"prompt": TALK, "chosen": GOOD, "rejected": BAD}]
    data = prepared(tmp_path, smollm2_tokenizer, rows)
    for example in data.train:
        assert decoded(smollm2_tokenizer, example) == [f"{GOOD}<|im_end|>", f"{BAD}<|im_end|>"]
        one, other = example.sequences
        start = int(one.supervised.argmax())
        assert one.input_ids[:start].tolist() == other.input_ids[:start].tolist()
    assert "checked against" in data.report["mask"]["method"]
    pairs = data.report["train"]["pairs"]
    assert pairs["chosen_longer"] == 1.0
    assert any("preferences also teach length" in notice for notice in data.report["notices"])
    shown = preview(data.train, smollm2_tokenizer, 1)
    assert [title.partition(", ")[2].partition(":")[0] for title in shown.titles] == ["chosen", "rejected"]


def test_rows_add_up_whatever_becomes_of_them(tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        *({"prompt": f"Rain {i}?", "chosen": GOOD, "rejected": BAD} for i in range(6)),
        {"prompt": "Same?", "chosen": GOOD, "rejected": GOOD},
        {"prompt": "Long?", "chosen": "yes " * 300, "rejected": BAD},
        {"prompt": "Alike?", "chosen": "yes " * 300 + "a", "rejected": "yes " * 300 + "b"},
        {"prompt": "Special?", "chosen": "<|im_end|>", "rejected": BAD},
    ]
    cut = prepared(tmp_path, smollm2_tokenizer, rows, on_bad_row="skip", max_length=120).report["train"]
    assert (cut["conversations"], cut["num_rejected"], cut["dropped"], cut["truncated"]) == (7, 2, 1, 3)
    assert any("chosen: " in row["reason"] for row in cut["rejected"])
    left = prepared(tmp_path, smollm2_tokenizer, rows, on_bad_row="skip", on_long="drop", max_length=120)
    assert (left.report["train"]["conversations"], left.report["train"]["dropped"]) == (6, 2)
    assert any("both are cut before they differ: " in notice for notice in left.report["notices"])
    with pytest.raises(DataError, match="longer than max_length 120"):
        prepared(tmp_path, smollm2_tokenizer, rows, on_bad_row="skip", on_long="error", max_length=120)
    with pytest.raises(DataError, match="chosen and rejected are the same") as caught:
        prepared(tmp_path, smollm2_tokenizer, rows)
    assert caught.value.line == 7


def test_held_out_pairs_are_distinct_and_shared_prompts_are_named(
    tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "Rain?", "chosen": f"Yes, {i} times.", "rejected": BAD} for i in range(10)]
    data = prepared(tmp_path, smollm2_tokenizer, [*rows, rows[0]], eval=0.3)
    assert (len(data.train), len(data.eval)) == (8, 3)
    assert len(data.report["shared_prompts"]) == 3
    chosen = [smollm2_tokenizer.decode(e.sequences[0].input_ids[e.sequences[0].supervised]) for e in data.eval]
    assert [f"{c.messages[-1]['content']}<|im_end|>" for c in data.eval_conversations] == chosen
    assert len(set(chosen)) == 3


def test_answers_to_prompts_of_other_tokens_are_refused_with_the_decoded_difference(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    def example(*ids: int, num_trained: int = 1) -> Example:
        supervised = np.arange(len(ids)) >= len(ids) - num_trained
        return Example(input_ids=np.array(ids), supervised=supervised, origin=Origin(file="a", line=1))

    one = example(300, 301, 302, 400)
    reason = _prompt_difference(one, example(300, 301, 303, 400), smollm2_tokenizer)
    here, there = (str(smollm2_tokenizer.decode([301, last])) for last in (302, 303))
    assert reason.endswith(f"not answers to the same prompt: {here!r} before chosen, {there!r} before rejected")
    assert _prompt_difference(one, example(300, 301, 302, 401, 402, num_trained=2), smollm2_tokenizer) == ""
    assert _prompt_difference(one, example(300, 301, 302, 400, num_trained=2), smollm2_tokenizer) != ""


def test_init_writes_a_recipe_for_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for shape in ("texts", "ShareGPT", "whole conversations"):
        file = write_jsonl(tmp_path / "mine.jsonl", [SHAPES[shape]] * 30)
        path, starter = init(str(file), overwrite=True)
        assert Recipe.load(path).model.task == "preference"
        assert "30 pairs" in starter.title


def test_pairs_are_recognized_and_other_rows_are_not() -> None:
    rows = [Row(file="a", line=n, value=SHAPES["texts"]) for n in range(3)]
    found = task_named("preference").starter_settings(rows)
    assert found is not None
    assert found.settings["model.task"][0] == "preference"
    assert task_named("preference").starter_settings([Row(file="a", line=1, value={"messages": TALK})]) is None


PREFERENCES = Path(__file__).parents[3] / "examples" / "preferences"


def shipped(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PREFERENCES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["prompts", "eval"])
def test_the_rows_that_are_shipped_are_those_of_the_script(name: str, tmp_path: Path) -> None:
    runpy.run_path(str(PREFERENCES / "make_pairs.py"))["main"](tmp_path)
    assert (tmp_path / f"{name}.jsonl").read_bytes() == (PREFERENCES / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["train", "eval"])
def test_the_pairs_that_are_shipped_can_be_read_and_are_of_different_requests(name: str) -> None:
    found = to_pairs([Row(file=name, line=n, value=row) for n, row in enumerate(shipped(name))])
    assert not found.rejected
    titles = {json.loads(pair.chosen.messages[-1]["content"])["title"] for pair in found.items}
    assert len(titles) == len(found.items)


def test_the_training_pairs_are_right_and_wrong_answers_to_the_prompts() -> None:
    right = {json.dumps(row["messages"][:-1]): row["messages"][-1]["content"] for row in shipped("prompts")}
    for row in shipped("train"):
        reference = right[json.dumps(row["prompt"])]
        assert (score("json", row["chosen"], reference), score("json", row["rejected"], reference)) == (1, 0)
