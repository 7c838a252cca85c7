"""From evidence of our own making to the verdict on a server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratune.exporting.endpoint.client import Endpoint
from loratune.exporting.endpoint.decision import ServedEvidence, decide_served
from loratune.exporting.endpoint.proof import ServedAnswers, ServedDistributions
from tests.exporting.endpoint.test_proof import answers, served

TEMPLATE = {"num_prompts": 12, "same_token_ids": 12, "first_difference": None}
ENDPOINT = Endpoint(root="http://here:80", model="tuned", models=("base", "tuned"))
NOTHING = answers()


def evidence(distributions: ServedDistributions | None = None, given: ServedAnswers = NOTHING) -> ServedEvidence:
    return ServedEvidence(
        endpoint=ENDPOINT,
        way="echo" if distributions else "",
        template=TEMPLATE,
        distributions=distributions or ServedDistributions(),
        answers=given,
    )


def test_the_trained_model_is_the_same_by_outputs_or_by_answers() -> None:
    for found in (evidence(served(1, 0)), evidence(given=answers(*["red."] * 12))):
        decision = decide_served(found)
        assert (decision.verdict, decision.complaints, decision.fix) == ("same", [], "")
    assert "not shown by it: where it stops" in decide_served(evidence(served(1, 0))).reason
    assert "not shown" not in decide_served(evidence(served(1, 0), answers(*["red."] * 12))).reason


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_base_is_different_under_any_noise_and_other_names_are_listed(noise: float) -> None:
    decision = decide_served(evidence(served(0, noise)))
    assert decision.verdict == "different"
    assert "tuned answers like the base without the adapter" in decision.reason
    assert "--model NAME, with one of base" in decision.fix
    assert decide_served(evidence(served(-1, noise))).reason.startswith("it serves another model")


def test_noise_alone_is_undecided_and_says_how_much_of_training_is_there() -> None:
    decision = decide_served(evidence(served(1, 1.0)))
    assert decision.verdict == "undecided"
    assert "how its weights were rounded is unknown" in decision.reason
    assert "certify the file that is served" in decision.fix


def test_right_outputs_with_wrong_chats_are_another_template() -> None:
    decision = decide_served(evidence(served(1, 0), answers(*["green."] * 12)))
    assert decision.verdict == "different"
    assert "in a chat, only 0 of 12 answers that training changed" in decision.reason
    assert "chat template" in decision.fix


def test_wrong_answers_alone_are_the_bases_or_another_models() -> None:
    assert "like the base without the adapter" in decide_served(evidence(given=answers(*["blue. And"] * 12))).reason
    assert "like another model" in decide_served(evidence(given=answers(*["green."] * 12))).reason


def test_other_prompts_are_different_whatever_is_answered() -> None:
    template = {"num_prompts": 12, "same_token_ids": 11, "first_difference": "9 tokens where training has 8"}
    decision = decide_served(replace(evidence(served(1, 0)), template=template))
    assert decision.verdict == "different"
    assert "1 of 12 prompts have different token ids: 9 tokens" in decision.reason


@pytest.mark.parametrize(
    ("found", "reason", "fix"),
    [
        (evidence(), "no chat could be compared", "llama.cpp or vLLM"),
        (evidence(given=answers("red.", "red.")), "would answer only 2 of 2 chats in another way", "data.eval"),
        (evidence(given=answers(*["red."] * 12, base="red.")), "would answer only 0 of 12 chats", "train longer"),
        (evidence(given=answers(*["red."] * 7, *["green."] * 5)), "7 of 12 greedy answers", "certify the file"),
    ],
)
def test_what_decides_nothing_says_why(found: ServedEvidence, reason: str, fix: str) -> None:
    decision = decide_served(found)
    assert decision.verdict == "undecided"
    assert reason in decision.reason
    assert fix in decision.fix


def test_a_model_that_training_hardly_moved_is_undecided() -> None:
    found = ServedDistributions(
        served_kl=[1e-4] * 50, base_kl=[1e-3] * 50, same_top=[True] * 50, decided=[True] * 50, shares=[(1.0, 1.0)] * 9
    )
    decision = decide_served(evidence(found))
    assert decision.verdict == "undecided"
    assert "so the base without the adapter would pass, too" in decision.reason
    few = ServedDistributions(served_kl=[0.0] * 5, base_kl=[1.0] * 5, same_top=[True] * 5, decided=[True] * 5)
    assert "only 5 positions" in decide_served(evidence(few)).reason
