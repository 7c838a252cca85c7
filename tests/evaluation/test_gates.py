from __future__ import annotations

from typing import Any

import pytest

from loratune.evaluation.gates import check_gates, check_names, parse_gate, pass_gates, reported_numbers
from loratune.run.errors import RecipeError, RunError

RECORD: dict[str, Any] = {
    "metric": "json",
    "base": {"json": 0.1, "nll": 2.0},
    "tuned": {"json": 0.8, "nll": 0.5},
    "difference": {"json": {"value": 0.7, "low": 0.6, "high": 0.8}, "nll": {"value": -1.5, "low": -1.7, "high": -1.3}},
    "forgetting": {
        "num_examples": 4,
        "base": {"nll": 3.0},
        "tuned": {"nll": 3.1},
        "difference": {"nll": {"value": 0.1, "low": -0.1, "high": 0.2}},
    },
    "harness": {"tasks": {"colors": {"acc": {"base": 0.3, "tuned": 0.5, "difference": {"value": 0.2}}}}},
    "items": [],
}


@pytest.mark.parametrize(
    ("gate", "passes"),
    [
        ("json>=0.8", True),
        ("json>0.8", False),
        ("tuned.nll <= 0.5", True),
        ("base.json<0.1", False),
        ("difference.json>=0.7", True),
        ("difference.json.low>0.65", False),
        ("difference.nll.high<0", True),
        ("forgetting.difference.nll.high<=0.15", False),
        ("forgetting.tuned.nll<3.2", True),
        ("harness.colors.acc>=5e-1", True),
        ("harness.colors.acc.difference>0.3", False),
    ],
)
def test_a_gate_holds_any_reported_number_to_a_threshold(gate: str, passes: bool) -> None:
    record = dict(RECORD)
    pass_gates([parse_gate(gate)], record)
    assert record["gates"][0]["passed"] is passes
    if passes:
        check_gates(record)
    else:
        with pytest.raises(RunError, match="1 of 1 gate failed") as error:
            check_gates(record)
        assert f"{record['gates'][0]['value']:.6g}" in str(error.value)
        assert error.value.exit_code == 1


@pytest.mark.parametrize("text", ["json", "json>=", "json>=many", "json==1", ">=1", "json>=nan", "json>=1 please"])
def test_what_is_no_threshold_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a threshold"):
        parse_gate(text)


def test_a_name_that_will_not_be_reported_is_refused_before_anything_is_measured() -> None:
    measures = ["json", "nll", "perplexity"]
    check_names([parse_gate("difference.json.low>0")], measures, forgetting=False, harness=False)
    check_names([parse_gate("forgetting.difference.nll<0.1")], measures, forgetting=True, harness=False)
    check_names([parse_gate("harness.colors.acc>0")], measures, forgetting=False, harness=True)
    for gate in ("jsn>0.8", "forgetting.difference.nll<0.1", "harness.colors.acc>0"):
        with pytest.raises(RecipeError, match="is reported"):
            check_names([parse_gate(gate)], measures, forgetting=False, harness=False)
    with pytest.raises(RecipeError) as error:
        check_names([parse_gate("jsn>0.8")], measures, forgetting=False, harness=False)
    assert error.value.fix == "did you mean json?"


def test_counts_and_texts_are_no_measures() -> None:
    assert not {name for name in reported_numbers(RECORD) if "num_examples" in name and "forgetting" not in name}
    assert "metric" not in reported_numbers(RECORD)
