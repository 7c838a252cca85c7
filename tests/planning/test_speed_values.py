"""Operations and seconds of a run, worked out by hand."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from loratune.planning import speed
from loratune.planning.speed import (
    EAGER_EFFICIENCY,
    StepProbe,
    TimePlan,
    best_seconds,
    rates_by_arithmetic,
    training_flops,
    with_probe,
)

PLAN = TimePlan(
    train_seconds=100.0,
    compile_seconds=20.0,
    evaluate_seconds=7.0,
    total_seconds=130.0,
    flops=1.0,
    flops_per_second=1.0,
    source="",
)
PROBE = StepProbe(num_tokens=50, first_step_seconds=12.0, step_seconds=5.0, peak_bytes=0)


def test_arithmetic_counts_products_over_a_part_of_the_rate() -> None:
    made = rates_by_arithmetic(1000, 300, num_answers=8, flops_per_second=1e6)
    rate = 1e6 * EAGER_EFFICIENCY
    assert made.train == pytest.approx(4 * 1000 / rate)
    assert made.forward == pytest.approx(2 * 1000 / rate)
    assert made.decode == pytest.approx(2 * 1000 * 8 / rate)
    assert made.head_train == pytest.approx(4 * 300 / rate)
    assert made.head_forward == pytest.approx(2 * 300 / rate)
    assert made.head_decode == pytest.approx(2 * 300 * 8 / rate)


def test_a_frozen_weight_takes_four_operations_a_token_and_a_trained_one_six() -> None:
    sizes = {"matmul_parameters": 1000, "head_parameters": 300, "trainable_parameters": 20}
    tokens = {"num_tokens": 7, "num_supervised": 3}
    frozen = 4 * 1000 * 7 + 4 * 300 * 3 + 6 * 20 * 7
    assert training_flops(**sizes, **tokens) == frozen
    assert training_flops(**sizes, **tokens, trained_head=300) == frozen + 2 * 300 * 3
    assert training_flops(**sizes, **tokens, trained_matrices=50) == frozen + 2 * 50 * 7


@pytest.mark.parametrize(("compile_seconds", "of_the_first_step"), [(20.0, 7.0), (0.0, 0.0)])
def test_the_first_step_of_a_probe_compiles_only_what_is_compiled(
    compile_seconds: float, of_the_first_step: float
) -> None:
    made = with_probe(replace(PLAN, compile_seconds=compile_seconds), PROBE, num_tokens=200)
    assert made.train_seconds == 200 / (50 / 5.0) + (12.0 - 5.0)
    assert made.compile_seconds == of_the_first_step
    assert made.total_seconds == 130.0 - 100.0 + made.train_seconds


def test_work_is_repeated_for_a_while_and_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 0.04, 0.04, 0.04, 0.05, 0.05, 0.05, 0.11, 0.2])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(speed, "TIMED_SECONDS", 0.1)
    monkeypatch.setattr(speed, "FEWEST_REPETITIONS", 1)
    runs: list[int] = []
    assert best_seconds(lambda: runs.append(1), "cpu") == pytest.approx(0.01)
    assert len(runs) == 3
