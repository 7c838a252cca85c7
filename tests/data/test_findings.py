"""Rows that look wrong are found, with their lines; rows that are right are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.findings import Finding, check_conversations
from loratune.data.masking.render import Rendered
from loratune.data.prepare import prepare_data
from loratune.data.prepared import PreparedData
from loratune.data.prompt_checks import PromptCheck, compare_with_prompts
from loratune.data.rows.conversation import Conversation
from loratune.data.rows.formats import to_conversations
from loratune.data.rows.row import Origin, Row
from loratune.data.statistics import histogram, scripts
from loratune.recipe.recipe import DataSection

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}


def chat(question: str, answer: str | None, **more: Any) -> dict[str, Any]:
    tools = more.pop("tools", None)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return {"messages": turns, **({"tools": tools} if tools else {})}


def conversations(*rows: dict[str, Any]) -> list[Conversation]:
    made, rejected = to_conversations([Row(file="a.jsonl", line=n, value=r) for n, r in enumerate(rows, 1)], "messages")
    assert not rejected
    return made


@pytest.fixture
def checked(smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., PreparedData]:
    def make(rows: list[Any], held_out: list[Any] | None = None, *, max_length: int = 512, **data: Any) -> PreparedData:
        values = {"train": write(tmp_path / "train.jsonl", rows), "eval": "none", **data}
        if held_out:
            values["eval"] = write(tmp_path / "eval.jsonl", held_out)
        section = DataSection.model_validate(values)
        return prepare_data(section, smollm2_tokenizer, max_length=max_length, seed=1)

    return make


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def found(data: PreparedData, side: str = "train") -> list[tuple[str, int]]:
    return [(finding["kind"], finding["line"]) for finding in data.report[side]["findings"]]


GOOD = chat("What is the capital of France?", "Paris.")


@pytest.mark.parametrize(
    ("row", "kind", "what"),
    [
        (chat("Hi", "<think>Hm. Hello"), "think_tags", "message 2 (assistant) has 1 <think> and 0 </think>"),
        (chat("Hi", "Hm.</think>Hello"), "think_tags", "message 2 (assistant) has 0 <think> and 1 </think>"),
        (chat("Hi", "</think>Hm.<think>"), "think_tags", "message 2 (assistant) has </think> before <think>"),
        (chat("Hi", " ... "), "no_words", "message 2 (assistant) is only '...'"),
        (chat("Hi there", "hi there "), "repeats_prompt", "message 2 (assistant) is the prompt"),
        (chat("So long a question? " * 3, "So long a question? " * 3 + "Yes, thank you very much indeed. " * 9),
         "repeats_prompt", "message 2 (assistant) starts with the prompt"),
        (chat("Rain?", None, tool_calls=[CALL]), "unknown_tool",
         "message 2 (assistant) calls weather; the row has no tools"),
        (chat("Caf\ufffd?", "Yes."), "broken_text", "message 1 (user) has U+FFFD at character 4"),
    ],
)  # fmt: skip
def test_a_row_that_looks_wrong_is_found_with_its_line(
    row: dict[str, Any], kind: str, what: str, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    findings = check_conversations(conversations(GOOD, row, GOOD), smollm2_tokenizer)

    assert findings == [Finding(kind=kind, origin=Origin(file="a.jsonl", line=2), what=what)]


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        chat("Hi", "<think>Hm.</think>Hello"),
        chat("Is <think> a tag?", "Yes."),
        chat("List of primes below 2?", "[]"),
        chat("Say yes.", "👍"),
        chat("Yes", "Yes, and more."),
        chat("Rain?", None, tool_calls=[CALL], tools=[WEATHER]),
    ],
)
def test_a_row_that_is_right_is_left_alone(row: dict[str, Any], smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    assert check_conversations(conversations(row), smollm2_tokenizer) == []


def test_a_row_that_a_weight_repeats_is_named_once(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    twice = conversations(chat("Hi", "...")) * 2

    assert len(check_conversations(twice, smollm2_tokenizer)) == 1


def test_an_overlap_duplicates_and_a_cut_answer_are_found_with_their_lines(
    checked: Callable[..., PreparedData],
) -> None:
    same = chat("Who?", "Nobody.")
    rows = [GOOD, same, chat("Count.", "one " * 100), same, same, chat("Where?", "There.")]

    data = checked(rows, [chat("When?", "Now."), chat("Where?", "There."), chat("Who?", "You.")], max_length=80)

    train = data.report["train"]
    assert found(data) == [("cut", 3)]
    assert train["findings"][0]["what"] == "truncated at 80 tokens, inside an answer, which loses its stop token"
    assert [[place["line"] for place in group] for group in train["duplicate_rows"]] == [[2, 4, 5]]
    assert [(pair["eval"]["line"], pair["train"][0]["line"]) for pair in data.report["overlap"]] == [(2, 6)]
    assert [(pair["eval"]["line"], pair["train"]["line"]) for pair in data.report["shared_prompts"]] == [(3, 2)]
    notices = "\n".join(data.report["notices"])
    for words in (
        "2 of 6 training conversations are exact duplicates: line 2 = line 4 = line 5.",
        "line 2 = training line 6",
        "train.jsonl:3 (truncated at 80 tokens",
        "1 held-out conversation has the same prompt as a training conversation, with another answer",
    ):
        assert words in notices


def test_an_example_that_just_fits_is_not_called_cut(checked: Callable[..., PreparedData]) -> None:
    rows = [chat("Count.", "one " * n) for n in (20, 30, 40)]
    fits = len(checked(rows).train[1].input_ids)

    assert found(checked(rows, max_length=fits)) == [("cut", 3)]


def test_answers_lost_behind_the_cut_are_counted(checked: Callable[..., PreparedData]) -> None:
    turns = [*chat("Who?", "Nobody.")["messages"], *chat("Why? " * 40, "So.")["messages"]]

    data = checked([{"messages": turns}], max_length=80)

    assert data.report["train"]["findings"][0]["what"] == "truncated at 80 tokens: 1 of 2 answers are missing"


def test_what_was_left_out_for_its_length_is_named(checked: Callable[..., PreparedData]) -> None:
    bad = {"messages": [{"role": "king", "content": "x"}]}

    data = checked([GOOD, bad, chat("Count.", "one " * 100)], max_length=80, on_long="drop", on_bad_row="skip")

    assert found(data) == [("dropped", 3)]
    held_out = checked([GOOD], [GOOD, chat("Count.", "one " * 100)], max_length=80, on_long="drop")
    assert found(held_out, "eval") == [("dropped", 2)]


def test_good_data_has_no_findings_and_no_notices(checked: Callable[..., PreparedData]) -> None:
    data = checked([GOOD, chat("Who?", "Nobody.")], [chat("When?", "Now.")])

    assert found(data) == found(data, "eval") == []
    assert data.report["notices"] == []
    assert data.report["prompts"]["checked"] == 2
    assert data.report["prompts"]["header_differs"] == data.report["prompts"]["history_differs"] == 0


def test_plain_text_is_checked_as_far_as_it_goes(checked: Callable[..., PreparedData]) -> None:
    data = checked([{"text": "Once upon a time."}], train_on="all", format="text")

    assert found(data) == []
    assert data.report["prompts"]["checked"] == 0
    assert data.report["train"]["scripts"] == {"LATIN": 1.0}


def test_prompts_that_a_template_starts_in_another_way_are_counted(
    with_template: Callable[..., PreTrainedTokenizerBase],
    rendered: Callable[..., Rendered],
) -> None:
    rows = conversations(chat("Who?", "Nobody."), chat("Why?", "<think>\nHm.\n</think>\n\nSo."))

    def check(template: str) -> PromptCheck:
        tokenizer = with_template(template)
        return compare_with_prompts(rendered(rows, tokenizer).examples, rows, tokenizer, thinking="keep")

    opened = check("qwen3_5_think")
    assert (opened.checked, opened.header, opened.history) == (2, 1, 0)
    assert opened.origin == Origin(file="a.jsonl", line=1)
    assert opened.served == "<think>\n"
    plain = check("qwen2_5")
    assert (plain.checked, plain.header, plain.history, plain.boundary) == (2, 0, 0, 0)
    # GPT-2's rule of splitting cuts a double line end in two where a word follows.
    joined = check("llama3")
    assert (joined.header, joined.history, joined.boundary) == (0, 0, 1)
    assert joined.origin is None


def test_the_histogram_has_every_example_in_one_bin() -> None:
    bins = histogram([37, 41, 41, 95, 160])

    assert bins["edges"] == [20, 40, 60, 80, 100, 120, 140, 160, 180]
    assert bins["counts"] == [1, 2, 0, 1, 0, 0, 0, 1]
    assert histogram([7]) == {"edges": [7, 8], "counts": [1]}


def test_scripts_are_shares_of_letters() -> None:
    shares = scripts(["да!", "abcdef, 12", "日本", "ok"])

    assert shares == {"LATIN": pytest.approx(8 / 12, abs=1e-4), "CYRILLIC": 0.1667, "CJK": 0.1667}
