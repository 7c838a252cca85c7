from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console

from loratune.data.examples import LabeledExample
from loratune.data.rows.row import Origin
from loratune.evaluation.record import paired_bootstrap
from loratune.workflows.tasks.classification.measures import (
    classification_record,
    classification_table,
    confusion_table,
)

NAMES = ["a", "b", "c", "d"]


def example(label: int) -> LabeledExample:
    ids = np.array([1, 2], dtype=np.int32)
    return LabeledExample(
        input_ids=ids,
        supervised=np.zeros(2, dtype=np.bool_),
        origin=Origin(file="f", line=1),
        label=label,
        name=NAMES[label],
        token_types=None,
        texts=("text",),
    )


def record_of(truth: list[int], base: list[int], tuned: list[int]) -> dict[str, object]:
    logits = [4.0 * torch.nn.functional.one_hot(torch.tensor(side), 4).float() for side in (base, tuned)]
    return classification_record(
        names=NAMES, examples=[example(label) for label in truth], base=logits[0], tuned=logits[1], majority="a"
    )


def test_the_numbers_are_those_of_the_definitions() -> None:
    truth, tuned = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    record = record_of(truth, [0] * 6, tuned)
    # a: hits 2, missed 1; b: hits 1, wrong 1, missed 1; c: hits 1, wrong 1; d occurs nowhere
    expected = (2 * 2 / 5 + 2 * 1 / 4 + 2 * 1 / 3) / 3
    assert record["tuned"]["f1"] == pytest.approx(expected)  # type: ignore[index]
    assert record["tuned"]["accuracy"] == pytest.approx(4 / 6)  # type: ignore[index]
    assert record["base"]["f1"] == pytest.approx((2 * 3 / 9 + 0 + 0) / 3)  # type: ignore[index]
    right, wrong = -np.log(np.exp(4) / (np.exp(4) + 3)), -np.log(1 / (np.exp(4) + 3))
    assert record["tuned"]["nll"] == pytest.approx((4 * right + 2 * wrong) / 6)  # type: ignore[index]
    assert record["confusion"]["tuned"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]  # type: ignore[index]
    assert record["majority"] == {"label": "a", "accuracy": 0.5, "f1": pytest.approx(2 * 3 / 9 / 3)}
    b, d = record["classes"][1], record["classes"][3]  # type: ignore[index]
    assert b == {"label": "b", "num_examples": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert d == {"label": "d", "num_examples": 0, "precision": None, "recall": None, "f1": None}


def test_the_interval_is_that_of_the_paired_bootstrap() -> None:
    draw = np.random.default_rng(3)
    truth = draw.integers(4, size=80)
    base, tuned = draw.integers(4, size=80), np.where(draw.random(80) < 0.7, truth, draw.integers(4, size=80))
    record = record_of(truth.tolist(), base.tolist(), tuned.tolist())
    other = paired_bootstrap((base == truth).astype(float), (tuned == truth).astype(float)).as_dict()
    mine = record["difference"]["accuracy"]  # type: ignore[index]
    assert mine["value"] == pytest.approx(other["value"])
    assert mine["low"] == pytest.approx(other["low"], abs=0.02)  # both are drawn, 10,000 times
    assert mine["high"] == pytest.approx(other["high"], abs=0.02)
    f1 = record["difference"]["f1"]  # type: ignore[index]
    assert f1["low"] < f1["value"] < f1["high"]


def test_the_tables_have_all_of_it() -> None:
    record = record_of([0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 2, 1])
    console = Console(width=160, record=True)
    console.print(classification_table(record), confusion_table(record))
    text = console.export_text()
    for words in ("majority class is", "75.0%", "50.0%", "F1 (macro)", "random", "+25.0 points"):
        assert words in text
