"""The quickstart task is what its README says: reproducible, strict, copied from the request, and truly held out."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "quickstart"
SPLITS = ("train", "eval")
KEYS = ["action", "title", "day", "time", "place", "notify", "urgent"]
ACTIONS = {"book", "move", "cancel", "remind"}

Messages = list[dict[str, str]]
Answer = dict[str, Any]


def conversations(split: str) -> list[Messages]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def requests_and_answers(split: str) -> Iterator[tuple[str, Answer]]:
    """Yield every answer with all that the user said before it."""
    for messages in conversations(split):
        for end in range(1, len(messages), 2):
            request = "\n".join(message["content"] for message in messages[:end:2])
            yield request, json.loads(messages[end]["content"])


def copied_values(answer: Answer) -> set[str]:
    values = {answer["title"], answer["day"], answer["time"], answer["place"], *answer["notify"]}
    return values - {None}


def named_values(split: str) -> set[str]:
    """Return every title, place and person of a split."""
    answers = [answer for _, answer in requests_and_answers(split)]
    values = {value for answer in answers for value in (answer["title"], answer["place"], *answer["notify"])}
    return values - {None}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def pattern(request: str, answer: Answer) -> str:
    """Return a request with the values of its answer blotted out."""
    for value in sorted(copied_values(answer), key=len, reverse=True):
        request = request.replace(value, "_")
    return request


def test_the_script_writes_the_files_that_are_shipped(tmp_path: Path) -> None:
    script = runpy.run_path(str(FOLDER / "make_data.py"))
    script["main"](tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_user_and_assistant_take_turns_and_the_assistant_ends(split: str) -> None:
    for messages in conversations(split):
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message.keys() == {"role", "content"} for message in messages)


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_has_exactly_the_keys_and_types_of_the_task(split: str) -> None:
    for _, answer in requests_and_answers(split):
        assert list(answer) == KEYS
        assert answer["action"] in ACTIONS
        assert isinstance(answer["title"], str)
        assert isinstance(answer["day"], str)
        assert isinstance(answer["time"], str | None)
        assert isinstance(answer["place"], str | None)
        assert isinstance(answer["notify"], list)
        assert all(isinstance(name, str) for name in answer["notify"])
        assert isinstance(answer["urgent"], bool)


@pytest.mark.parametrize("split", SPLITS)
def test_every_copied_value_stands_in_the_request_as_it_stands_in_the_answer(split: str) -> None:
    for request, answer in requests_and_answers(split):
        missing = [value for value in copied_values(answer) if not re.search(rf"\b{re.escape(value)}\b", request)]
        assert not missing, (request, missing)


@pytest.mark.parametrize("split", SPLITS)
def test_every_optional_field_is_sometimes_there_and_sometimes_not(split: str) -> None:
    answers = [answer for _, answer in requests_and_answers(split)]
    for key in ("time", "place", "notify", "urgent"):
        assert {bool(answer[key]) for answer in answers} == {True, False}
    assert {answer["action"] for answer in answers} == ACTIONS


@pytest.mark.parametrize("split", SPLITS)
def test_some_conversations_have_a_second_turn_that_changes_the_answer(split: str) -> None:
    amended = [messages for messages in conversations(split) if len(messages) == 4]
    assert len(amended) >= 0.05 * len(conversations(split))
    assert all(messages[1]["content"] != messages[3]["content"] for messages in amended)


@pytest.mark.parametrize("split", SPLITS)
def test_no_title_is_asked_for_twice(split: str) -> None:
    titles = [json.loads(messages[1]["content"])["title"] for messages in conversations(split)]
    assert len(titles) == len(set(titles))


def test_no_word_of_a_held_out_title_place_or_person_occurs_anywhere_in_training() -> None:
    trained = set().union(*(words(message["content"]) for messages in conversations("train") for message in messages))
    held_out = set().union(*(words(value) for value in named_values("eval")))
    assert not held_out & trained


def test_no_held_out_request_is_a_training_request_with_other_punctuation_or_case() -> None:
    trained = {" ".join(sorted(words(request))) for request, _ in requests_and_answers("train")}
    held_out = {" ".join(sorted(words(request))) for request, _ in requests_and_answers("eval")}
    assert not held_out & trained


def test_requests_are_phrased_in_many_ways() -> None:
    patterns = {pattern(request, answer) for request, answer in requests_and_answers("train")}
    assert len(patterns) > 0.8 * len(conversations("train"))


def test_there_are_several_hundred_training_conversations_and_a_hundred_held_out() -> None:
    assert 400 <= len(conversations("train")) <= 600
    assert len(conversations("eval")) == 100
