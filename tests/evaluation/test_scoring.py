"""What counts as the right answer, at the edges."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from loratune.evaluation.scoring import check_references, score
from loratune.run.errors import DataError


@dataclass(frozen=True)
class Place:
    file: str = "eval.jsonl"
    line: int | None = 7


@dataclass(frozen=True)
class TinyPrompt:
    reference: str
    more: tuple[str, ...] = ()
    input_ids: list[int] = field(default_factory=list)
    origin: Place = field(default_factory=Place)
    text: str = ""
    question: str = ""

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference, *self.more)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ('{"a": 1, "b": [true, null]}', '{"b":[true,null],"a":1}'),
        (' {"a": 1}\n', '{"a": 1}'),
        ("1.0", "1"),
        ("0.10", "0.1"),
        ("1e2", "100"),
        ('"é"', '"\\u00e9"'),
        ("[]", "[ ]"),
        ("1e400", "10e399"),
    ],
)
def test_json_accepts_the_same_value_however_it_is_written(answer: str, reference: str) -> None:
    assert score("json", answer, reference) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("true", "1"),
        ("0", "false"),
        ('{"a": [1]}', '{"a": [true]}'),
        ('"1"', "1"),
        ("null", "0"),
        ('"null"', "null"),
        ("[1, 2]", "[2, 1]"),
        ("[1]", "[1, 1]"),
        ("{}", "[]"),
        ('{"a": 1}', '{"a": 1, "b": 2}'),
        ('{"a": 1, "b": null}', '{"a": 1}'),
        ("1e400", "1e401"),
        ("0.1000000000000000001", "0.1"),
    ],
)
def test_json_refuses_another_value(answer: str, reference: str) -> None:
    assert score("json", answer, reference) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        '{"a": 1} and more',
        'Here it is: {"a": 1}',
        '```json\n{"a": 1}\n```',
        '{"a": 1}{"a": 1}',
        '{"a": 2, "a": 1}',
        '{"a": 1, "a": 1}',
        '{"a": NaN}',
        '{"a": Infinity}',
        "{'a': 1}",
        '{"a": 1,}',
        "[" * 100_000,
        "9" * 10_000,
        "1e99999999999999999999",
    ],
)
def test_json_refuses_what_is_no_json_document(answer: str) -> None:
    assert score("json", answer, '{"a": 1}') == 0.0


def test_a_reference_that_is_no_json_is_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(DataError, match="'yes' is not JSON"):
        score("json", "yes", "yes")


def test_exact_match_ignores_white_space_around_the_answer_only() -> None:
    assert score("exact_match", " yes\n", "yes") == 1.0
    assert score("exact_match", "Yes", "yes") == 0.0
    assert score("exact_match", "a  b", "a b") == 0.0


def test_contains_finds_the_reference_anywhere() -> None:
    assert score("contains", "The answer is 42.", " 42 ") == 1.0
    assert score("contains", "4 2", "42") == 0.0


def test_references_are_checked_with_file_and_line() -> None:
    check_references("json", [TinyPrompt("{}")])
    check_references("none", [TinyPrompt("")])
    with pytest.raises(DataError, match=r"eval\.jsonl:7: .*'\[1' is not JSON"):
        check_references("json", [TinyPrompt("{}"), TinyPrompt("[1")])
    with pytest.raises(DataError, match=r"eval\.jsonl:7: the reference answer is empty"):
        check_references("contains", [TinyPrompt(" ")])
