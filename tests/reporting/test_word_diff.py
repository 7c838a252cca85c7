from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import example, given

from loratune.reporting.word_diff import DiffPiece, mark_differences

SENTENCES = st.lists(st.sampled_from(["a", "b", "ü", "42", "{", '"', ",", "\n", "  ", "<b>", "🙂"]), max_size=12).map(
    " ".join
)


@given(SENTENCES, SENTENCES)
@example("", "")
def test_the_pieces_are_the_answer_and_the_marks_lead_to_the_reference(answer: str, reference: str) -> None:
    pieces = mark_differences(answer, reference)
    assert "".join(piece.text for piece in pieces if piece.kind != "missing") == answer
    if len(pieces) > 1:
        assert "".join(piece.text for piece in pieces if piece.kind != "extra") == reference


def test_only_the_words_that_differ_are_mark_differences() -> None:
    assert mark_differences('{"day":"monday","urgent":true}', '{"day":"monday","urgent":false}') == (
        DiffPiece('{"day":"monday","urgent":', "plain"),
        DiffPiece("false", "missing"),
        DiffPiece("true", "extra"),
        DiffPiece("}", "plain"),
    )


def test_spaces_alone_are_nothing_in_common() -> None:
    assert mark_differences("one two three four five", "six seven eight nine ten") == (
        DiffPiece("one two three four five", "plain"),
    )


def test_an_answer_of_other_words_is_left_alone() -> None:
    assert mark_differences("I cannot help with that, sorry", '{"day":"monday"}') == (
        DiffPiece("I cannot help with that, sorry", "plain"),
    )
