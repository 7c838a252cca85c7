"""The answers of another program, scored beside the run's own."""

from __future__ import annotations

import pytest

from loratune.evaluation.other_program import score_answers
from loratune.evaluation.record import paired_bootstrap

ITEMS = [
    {"reference": "red", "tuned": {"text": "red"}},
    {"reference": "blue", "tuned": {"text": "blue"}},
    {"reference": "green", "references": ["green", "olive"], "tuned": {"text": "pink"}},
    {"reference": "grey", "tuned": {"text": "<think>hm</think>grey"}},
]


def test_the_difference_is_paired_and_thoughts_do_not_count() -> None:
    found = score_answers("exact_match", ITEMS, ["red", "navy", "olive", "<think>…</think>black"])
    assert found is not None
    assert (found["score"], found["run_score"]) == (0.5, 0.75)
    assert found["difference"] == paired_bootstrap([1, 1, 0, 1], [1, 0, 1, 0]).as_dict()


def test_the_same_answers_cost_nothing() -> None:
    found = score_answers("exact_match", ITEMS, [str(item["tuned"]["text"]) for item in ITEMS])
    assert found is not None
    assert found["difference"] == {"value": 0, "low": 0, "high": 0}


def test_bleu_is_computed_over_all_answers() -> None:
    pytest.importorskip("sacrebleu")
    text = "the cat sat on the mat and slept"
    items = [{"reference": text, "tuned": {"text": text}} for _ in range(3)]
    found = score_answers("bleu", items, [text, text, "the cat sat on a mat and slept"])
    assert found is not None
    assert found["run_score"] == pytest.approx(100)
    assert found["difference"]["value"] == pytest.approx(found["score"] - 100)
    assert found["difference"]["low"] <= found["difference"]["value"] < 0


def test_what_has_no_metric_of_ours_has_no_score() -> None:
    assert score_answers("none", ITEMS, ["", "", "", ""]) is None
    assert score_answers("own.py:longer", ITEMS, ["", "", "", ""]) is None
    assert score_answers("json", [], []) is None
