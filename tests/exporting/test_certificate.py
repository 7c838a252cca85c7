"""A certificate passes where the export computes the same, and fails where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.exporting.certificate import EXACT, Target, Tolerance, Written, certify, score_in_words, summary
from loratune.exporting.places import Question
from loratune.exporting.reference_outputs import Divergence, ReferenceOutputs
from loratune.exporting.verdict import allowed_flips
from loratune.run.directory import Record

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


AS_TRAINED = Divergence(kl=torch.zeros(3), same_top=torch.ones(3, dtype=torch.bool))
FAR = Divergence(kl=torch.full((3,), 0.5), same_top=torch.tensor([True, False, True]))
EXPECTED = ReferenceOutputs(
    examples=[example([False, False, True, True, True])],
    logprobs=[LOGITS_SV.log_softmax(-1)],
    questions=[Question(messages=({"role": "user", "content": "a"},), tools=None, input_ids=PROMPT)],
    stop_token_ids=STOPS,
    base=FAR,
    rounded=AS_TRAINED,
)
PROVEN = {
    "num_changed": 2,
    "num_unchanged": 3,
    "types": ["F32"],
    "relative_error": 1e-3,
    "kept": 1.0,
    "least_kept": 1.0,
    "least_kept_tensor": "q",
    "largest_deviation": 0.0,
    "problems": [],
    "fixes": [],
}


def certificate(
    target: Target,
    *,
    expected: ReferenceOutputs = EXPECTED,
    tolerance: Tolerance = EXACT,
    weights: Record | None = PROVEN,
    rounding_known: bool = True,
    stops_required: bool = True,
) -> Record:
    written = Written(load=lambda _: target, tolerance=tolerance, prove=lambda: weights, rounding_known=rounding_known)
    return certify(expected, target, written, stops_required=stops_required)


def test_the_same_outputs_pass() -> None:
    record = certificate(Table())
    assert record["passed"]
    assert record["complaints"] == []
    assert record["template"] == {"num_prompts": 1, "same_token_ids": 1, "first_difference": None}
    assert record["stop_tokens"] == {"ids": [2, 7], "missing": []}
    assert record["distributions"]["mean_kl"] == pytest.approx(0, abs=1e-12)
    assert "same token ids for 1 of 1 prompts, same top token at 100.0% of 3 positions" in summary(record)


def test_missing_stop_tokens_fail_a_full_model_and_are_listed_for_an_adapter() -> None:
    target = Table(stops=(2,))
    record = certificate(target)
    assert not record["passed"]
    assert record["complaints"] == ["answers do not end at the tokens [7]"]
    record = certificate(target, stops_required=False)
    assert record["passed"]
    assert record["stop_tokens"]["missing"] == [7]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([4, 8], r"at token 1, \[8\] where training has \[9\]"), ([4], r"at token 1, \[\] where training has \[9\]")],
)
def test_a_prompt_of_other_tokens_fails_and_the_first_one_is_named(prompt: list[int], words: str) -> None:
    record = certificate(Table(prompt=prompt))
    (complaint,) = record["complaints"]
    assert complaint.startswith("1 of 1 prompts have different token ids")
    assert words.replace("\\", "") in complaint


def test_the_divergence_is_that_of_training_from_the_target_in_nats() -> None:
    other = LOGITS_SV + torch.tensor([0.0, 0.3, -0.2, 0.1])
    record = certificate(Table(other))
    wanted = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), LOGITS_SV.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert record["distributions"]["mean_kl"] == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert record["distributions"]["max_kl"] == pytest.approx(float(wanted.max()), rel=1e-4)
    assert any("mean KL divergence" in complaint for complaint in record["complaints"])


def test_one_other_token_of_few_is_an_accident_and_many_are_not() -> None:
    """1 of 66 places refused the right merge of a short run."""
    assert allowed_flips(66, 0) >= 1
    assert allowed_flips(445, 0) >= 5
    assert allowed_flips(445, 0) < 20
    assert allowed_flips(445, 40) > allowed_flips(445, 0), "as many as the trained model's own rounding flips"


def test_what_the_base_without_the_adapter_would_pass_is_undecided_unless_the_weights_settle_it() -> None:
    near = replace(EXPECTED, base=Divergence(kl=torch.full((3,), 1e-8), same_top=AS_TRAINED.same_top))
    assert certificate(Table(), expected=near, weights=None)["verdict"] == "undecided"
    assert certificate(Table(), expected=near, weights=PROVEN)["verdict"] == "same"
    lost = {**PROVEN, "relative_error": 0.9, "kept": 0.2, "types": ["BF16"]}
    record = certificate(Table(), expected=near, weights=lost)
    assert (record["verdict"], record["passed"], record["complaints"]) == ("undecided", False, [])
    assert "rounding to BF16 left 20% of the update" in record["reason"]
    assert "the adapter alone, without merging" in record["fix"]


def test_rounding_as_large_as_training_decides_nothing() -> None:
    noisy = replace(EXPECTED, rounded=replace(FAR, kl=torch.full((3,), 0.4)))
    lost = {**PROVEN, "relative_error": 5.0}
    record = certificate(Table(), expected=noisy, weights=lost)
    assert record["verdict"] == "undecided"
    assert record["tolerance"]["mean_kl"] == pytest.approx(0.8, rel=1e-3)


def test_the_divergence_of_rounding_alone_is_recorded_and_zero_where_nothing_is_rounded() -> None:
    noisy = replace(EXPECTED, rounded=replace(FAR, kl=torch.full((3,), 0.4)))
    found = [certificate(Table(), expected=expected)["distributions"]["rounding_kl"] for expected in (EXPECTED, noisy)]
    assert found == [0.0, pytest.approx(0.4)]


def test_where_rounding_is_unknown_the_outputs_alone_say_same_or_nothing() -> None:
    many = Divergence(kl=torch.full((30,), 0.5), same_top=torch.ones(30, dtype=torch.bool))
    ten = replace(EXPECTED, examples=EXPECTED.examples * 10, logprobs=EXPECTED.logprobs * 10, base=many, rounded=many)
    ten = replace(ten, rounded=replace(many, kl=torch.zeros(30)))
    near = certificate(Table(LOGITS_SV * 1.05), expected=ten, weights=None, rounding_known=False)
    assert near["verdict"] == "same"
    assert certificate(Table(LOGITS_SV * 1.05), expected=ten, weights=None)["verdict"] == "different"
    far = certificate(Table(LOGITS_SV * 0.5), expected=ten, weights=None, rounding_known=False)
    assert far["verdict"] == "undecided"
    assert "how its weights were rounded is unknown" in far["reason"]


def test_three_positions_alone_decide_nothing() -> None:
    record = certificate(Table(), weights=None)
    assert record["verdict"] == "undecided"
    assert "only 3 positions" in record["reason"]


def test_right_weights_that_answer_otherwise_are_different_and_a_bug_of_ours() -> None:
    record = certificate(Table(LOGITS_SV.roll(1, dims=1)))
    assert record["verdict"] == "different"
    assert "and 0.5 for the base without the adapter" in record["reason"]
    assert "report this as a bug" in record["fix"]


def test_a_known_cause_is_named_with_its_own_fix_and_is_no_bug_of_ours() -> None:
    wrong = {**PROVEN, "problems": ["whatever it says", "another"], "fixes": ["do this", "do that"]}
    record = certificate(Table(LOGITS_SV.roll(1, dims=1)), weights=wrong)
    assert record["complaints"] == wrong["problems"]
    assert record["fix"] == "do this; do that"


def test_logits_that_are_not_finite_fail() -> None:
    record = certificate(Table(torch.full_like(LOGITS_SV, torch.nan)))
    assert "its logits are not finite" in record["complaints"]
    assert record["distributions"]["mean_kl"] is None


def test_a_rounding_error_larger_than_the_update_is_not_shown_as_a_share_of_it() -> None:
    noisy = {**PROVEN, "relative_error": 37.0, "kept": 1.31}
    assert "a rounding error of 37 times the update in the weights" in summary(certificate(Table(), weights=noisy))
    assert "100% of the update in the weights" in summary(certificate(Table()))


def test_a_padded_vocabulary_is_the_same_model() -> None:
    padded = torch.cat([LOGITS_SV, torch.full((3, 2), 9.0)], dim=1)
    assert certificate(Table(padded))["passed"]


@pytest.mark.parametrize(
    ("metric", "factor", "words"),
    [
        ("json", 1, "JSON correct 80.0% (-2.0 points, -6.0 to +2.0)"),
        ("bleu", 100, "BLEU 80 (-2.0 points, -6.0 to +2.0)"),  # is a number up to 100 itself
    ],
)
def test_scores_of_answers_are_shown_in_percent_and_bleu_as_it_is(metric: str, factor: int, words: str) -> None:
    scores = {"score": 0.8, "difference": {"value": -0.02, "low": -0.06, "high": 0.02}}
    scaled = {key: value * factor for key, value in scores["difference"].items()}
    answers = {"metric": metric, "scores": {"score": 0.8 * factor, "difference": scaled}}
    assert score_in_words(answers) == words
