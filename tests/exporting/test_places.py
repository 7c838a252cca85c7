"""Where an export is compared: positions of held-out answers, of training ones where these are few, and prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from loratune.data.rows.row import Origin
from loratune.exporting.places import (
    ENOUGH_POSITIONS,
    MAX_POSITIONS,
    POSITIONS_PER_EXAMPLE,
    choose_examples,
    choose_questions,
)
from tests.exporting.test_certificate import example

LONG = example([False, *([True] * 100), False])


def test_positions_are_spread_over_each_example_up_to_a_total() -> None:
    (chosen,), where = choose_examples([LONG], [])
    positions = np.flatnonzero(chosen.supervised)
    assert where == "held-out"
    assert len(positions) == POSITIONS_PER_EXAMPLE
    assert (positions[0], positions[-1]) == (1, 100)
    assert len(chosen.input_ids) == 101, "what follows the last position is not computed"
    many, _ = choose_examples([LONG] * 100, [])
    assert sum(int(item.supervised.sum()) for item in many) == MAX_POSITIONS
    assert choose_examples([example([True, False])], []) == ([], ""), "nothing predicts the first token"


def test_training_examples_are_added_where_held_out_ones_are_few() -> None:
    few = replace(example([False, True, True]), origin=Origin(file="held_out.jsonl", line=9))
    chosen, where = choose_examples([few], [LONG] * 100)
    assert where == "held-out and training"
    assert sum(int(item.supervised.sum()) for item in chosen) == MAX_POSITIONS
    assert choose_examples([], [LONG])[1] == "training"
    enough = [example([False, True])] * ENOUGH_POSITIONS
    assert choose_examples(enough, [LONG])[1] == "held-out"
    once, where = choose_examples([few], [few])
    assert (len(once), where) == (1, "held-out"), "an example is compared once"


def test_without_held_out_conversations_the_template_is_tried_on_one_of_ours(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    (question,) = choose_questions([], smollm2_tokenizer)
    assert "And of Italy?" in smollm2_tokenizer.decode(question.input_ids)
    assert [message["role"] for message in question.messages] == ["user", "assistant", "user"]
