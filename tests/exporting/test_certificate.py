"""A certificate passes where the export computes the same, and fails where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.exporting.certificate import (
    EXACT,
    MAX_POSITIONS,
    POSITIONS_PER_EXAMPLE,
    ROUNDED,
    Question,
    ReferenceOutputs,
    certify,
    choose_examples,
    summary,
)

STOPS = (2, 7)
IDS = [4, 9, 3, 8, 2]
PROMPT = [4, 9]
LOGITS_SV = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.1, 0.0, -2.0, -2.0], [-1.0, 0.0, 1.0, 4.0]])


class Table:
    """A target that answers from tables, in place of a loaded model."""

    checked_with = "a table"

    def __init__(
        self, logits_SV: torch.Tensor = LOGITS_SV, prompt: Sequence[int] = PROMPT, stops: Sequence[int] = STOPS
    ) -> None:
        self._logits_SV, self._prompt, self._stops = logits_SV, list(prompt), stops

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        return self._prompt

    def logits(self, input_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        assert list(positions) == [1, 2, 3], "the token after each of them is supervised"
        return self._logits_SV

    def ends_with(self, token_id: int) -> bool:
        return token_id in self._stops


def example(supervised: list[bool]) -> Example:
    ids = np.array((IDS * len(supervised))[: len(supervised)], dtype=np.int32)
    return Example(
        input_ids=ids,
        supervised=np.array(supervised, dtype=np.bool_),
        origin=Origin(file="eval.jsonl", line=1),
    )


EXPECTED = ReferenceOutputs(
    examples=[example([False, False, True, True, True])],
    logprobs=[LOGITS_SV.log_softmax(-1)],
    questions=[Question(messages=({"role": "user", "content": "a"},), tools=None, input_ids=PROMPT)],
    stop_token_ids=STOPS,
)


def test_the_same_outputs_pass() -> None:
    record = certify(EXPECTED, Table(), EXACT, stops_required=True)
    assert record["passed"]
    assert record["complaints"] == []
    assert record["template"] == {"num_prompts": 1, "same_token_ids": 1, "first_difference": None}
    assert record["stop_tokens"] == {"ids": [2, 7], "missing": []}
    assert record["distributions"]["mean_kl"] == pytest.approx(0, abs=1e-12)
    assert "same token ids for 1 of 1 prompts, same top token at 100.0% of 3 positions" in summary(record)


def test_missing_stop_tokens_fail_a_full_model_and_are_listed_for_an_adapter() -> None:
    target = Table(stops=(2,))
    record = certify(EXPECTED, target, EXACT, stops_required=True)
    assert not record["passed"]
    assert record["complaints"] == ["answers do not end at the tokens [7]"]
    record = certify(EXPECTED, target, EXACT, stops_required=False)
    assert record["passed"]
    assert record["stop_tokens"]["missing"] == [7]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([4, 8], r"at token 1, \[8\] where training has \[9\]"), ([4], r"at token 1, \[\] where training has \[9\]")],
)
def test_a_prompt_of_other_tokens_fails_and_the_first_one_is_named(prompt: list[int], words: str) -> None:
    record = certify(EXPECTED, Table(prompt=prompt), EXACT, stops_required=True)
    (complaint,) = record["complaints"]
    assert complaint.startswith("1 of 1 prompts have different token ids")
    assert words.replace("\\", "") in complaint


def test_the_divergence_is_that_of_training_from_the_target_in_nats() -> None:
    other = LOGITS_SV + torch.tensor([0.0, 0.3, -0.2, 0.1])
    record = certify(EXPECTED, Table(other), EXACT, stops_required=True)
    wanted = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), LOGITS_SV.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert record["distributions"]["mean_kl"] == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert record["distributions"]["max_kl"] == pytest.approx(float(wanted.max()), rel=1e-4)
    assert any("mean KL divergence" in complaint for complaint in record["complaints"])


def test_another_top_token_counts_only_where_it_led_by_the_margin() -> None:
    close, clear = LOGITS_SV.clone(), LOGITS_SV.clone()
    close[1, :2] = torch.tensor([0.0, 0.1])  # led by 0.1 nats
    clear[0, :2] = torch.tensor([1.0, 3.0])  # led by 2 nats
    record = certify(EXPECTED, Table(close), ROUNDED, stops_required=True)
    assert record["passed"]
    assert record["distributions"]["num_decided"] == 2
    assert record["distributions"]["top1_agreement"] == pytest.approx(2 / 3)
    record = certify(EXPECTED, Table(clear), ROUNDED, stops_required=True)
    assert any(complaint.startswith("the top token is the same at 50.0% of 2") for complaint in record["complaints"])


def test_logits_that_are_not_finite_fail() -> None:
    record = certify(EXPECTED, Table(torch.full_like(LOGITS_SV, torch.nan)), EXACT, stops_required=True)
    assert "its logits are not finite" in record["complaints"]
    assert record["distributions"]["mean_kl"] is None


def test_a_padded_vocabulary_is_the_same_model() -> None:
    padded = torch.cat([LOGITS_SV, torch.full((3, 2), 9.0)], dim=1)
    assert certify(EXPECTED, Table(padded), EXACT, stops_required=True)["passed"]


def test_positions_are_spread_over_each_example_up_to_a_total() -> None:
    long = example([False, *([True] * 100), False])
    (chosen,) = choose_examples([long])
    positions = np.flatnonzero(chosen.supervised)
    assert len(positions) == POSITIONS_PER_EXAMPLE
    assert (positions[0], positions[-1]) == (1, 100)
    assert len(chosen.input_ids) == 101, "what follows the last position is not computed"
    many = choose_examples([long] * 100)
    assert sum(int(item.supervised.sum()) for item in many) == MAX_POSITIONS
    assert choose_examples([example([True, False])]) == [], "nothing predicts the first token"
