"""The verdict in one sentence."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from loratune.evaluation.record import evaluation_record
from loratune.reporting.verdict import verdict_on
from loratune.run.records.base import parse
from loratune.run.records.evaluation import EvaluationRecord, LengthsOfAnswers


def record(metric: str, scores: tuple[float, float, float, float] | None, nll: tuple[float, float]) -> EvaluationRecord:
    """An evaluation with one metric (base, tuned, low, high) and losses of ten conversations."""
    made: dict[str, Any] = evaluation_record(
        metric="none",
        prompts=[],
        base_answers=[],
        tuned_answers=[],
        base_nll=[(10 * nll[0], 10)] * 10,
        tuned_nll=[(10 * nll[1], 10)] * 10,
    )
    if scores is not None:
        base, tuned, low, high = scores
        made["base"][metric], made["tuned"][metric] = base, tuned
        made["difference"][metric] = {"value": tuned - base, "low": low, "high": high}
    return parse(EvaluationRecord, {**made, "metric": metric, "adapter": {"kind": "last", "steps": [1]}})


@pytest.mark.parametrize(
    ("nll", "has_pairs", "is_told"), [((1, 1.5), True, True), ((1, 0.5), True, False), ((1, 1.5), False, False)]
)
def test_chosen_answers_that_fell_are_told_if_it_is_no_chance(
    nll: tuple[float, float], has_pairs: bool, is_told: bool
) -> None:
    lengths = dict.fromkeys(get_type_hints(LengthsOfAnswers), 2)
    preference: Any = {"loss": "dpo", "beta": 0.1, "rewards": None, "lengths": lengths}
    made = record("json", (0.02, 0.09, 0.01, 0.13), nll).model_dump()
    made["preference"] = preference if has_pairs else None
    sentence = verdict_on(parse(EvaluationRecord, made)).sentence
    assert ("became less likely, by 0.5 nats per token" in sentence) == is_told
    made["difference"]["nll"]["low"] = -0.1
    assert "less likely" not in verdict_on(parse(EvaluationRecord, made)).sentence


@pytest.mark.parametrize(
    ("scores", "nll", "outcome", "words"),
    [
        ((0.02, 0.8, 0.69, 0.87), (3, 1), "better", "JSON correct 2.0% → 80.0%, +69.0 to +87.0 points (95% interval"),
        ((0.5, 0.52, -0.1, 0.14), (3, 3), "not better", "try more epochs"),
        ((0.5, 0.52, -0.1, 0.14), (3, 1), "not better", "but the held-out loss 3 → 1"),
        ((0.8, 0.3, -0.6, -0.4), (1, 3), "worse", "lower train.learning_rate"),
    ],
)
def test_by_the_metric(
    scores: tuple[float, float, float, float], nll: tuple[float, float], outcome: str, words: str
) -> None:
    found = verdict_on(record("json", scores, nll))
    assert found.outcome == outcome
    assert found.sentence.startswith(f"{outcome}: ")
    assert words in found.sentence
    assert ("try" in found.sentence) == (outcome != "better")


@pytest.mark.parametrize(("nll", "outcome"), [((3, 1), "better"), ((1, 3), "worse"), ((2, 2), "not better")])
def test_without_a_metric_by_the_loss_where_lower_is_better(nll: tuple[float, float], outcome: str) -> None:
    found = verdict_on(record("none", None, nll))
    assert found.outcome == outcome
    assert f"held-out loss {nll[0]} → {nll[1]}" in found.sentence
    assert "10 held-out examples" in found.sentence
