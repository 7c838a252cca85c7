"""What `init` makes of columns and answers."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from loratune.data.rows.row import Row
from loratune.recipe.recipe import Column
from loratune.run.errors import RecipeError
from loratune.workflows.guidance.guesses import answer_tokens, guess_columns, read_columns, suggest_metric


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("Q", "A"), {"prompt": "Q", "completion": "A"}),
        (("instruction", "response"), {"prompt": "instruction", "completion": "response"}),
        (("input", "output", "id"), {"prompt": "input", "completion": "output"}),
        (("Frage", "Antwort"), {"prompt": "Frage", "completion": "Antwort"}),
        (
            ("User", "Assistant", "system_prompt"),
            {"prompt": "User", "completion": "Assistant", "system": "system_prompt"},
        ),
        (("left", "right"), {}),
        (("question", "notes"), {}),
    ],
)
def test_usual_names_are_recognized_in_any_case(columns: tuple[str, ...], found: dict[str, str]) -> None:
    assert guess_columns([Row(file="a.csv", line=2, value=dict.fromkeys(columns, "x"))]) == found


def test_columns_are_read_from_the_command_line() -> None:
    known = get_args(Column)
    assert read_columns("prompt=My question, completion=A=B", known) == {"prompt": "My question", "completion": "A=B"}
    for wrong in ("prompt", "nothing=A", "prompt="):
        with pytest.raises(RecipeError, match="is not FIELD=COLUMN"):
            read_columns(wrong, known)


@pytest.mark.parametrize(
    ("answers", "metric"),
    [
        ([json.dumps({"n": n}) for n in range(20)], "json"),
        (["yes", "no"] * 20, "exact_match"),
        ([f"It is {n}" for n in range(20)], "contains"),
        (["a rather long answer of more than eight words, which nobody writes twice"] * 3, None),
        (["yes", ""], None),
        ([], None),
    ],
)
def test_a_metric_fits_the_answers(answers: list[str], metric: str | None) -> None:
    found = suggest_metric(answers)
    assert (found and found[0]) == metric


def test_answers_get_room_for_the_longest() -> None:
    assert answer_tokens(["x" * 10], 256) == 16
    assert answer_tokens(["x" * 101, "y"], 256) == 64
    assert answer_tokens(["x" * 9999], 256) == answer_tokens([], 256) == 256
