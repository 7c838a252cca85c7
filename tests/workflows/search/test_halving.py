"""Which trials go on, and what the differences of their losses say."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from loratune.evaluation.record import nll_record, paired_differences
from loratune.run.records.sweep import SweepRecord, TrialLosses
from loratune.workflows.search.halving import by_clock, choose_survivors, level_for, mean_loss, plan_rungs, step_of
from loratune.workflows.search.results import TrialSoFar, rank_trials, sensitivity

ROWS = 60


def rows(shift: float, *, noise: float = 0.05, seed: int = 0) -> list[tuple[float, int]]:
    """Losses of rows that differ much among themselves, and little between models."""
    difficulty = np.random.default_rng(99).gamma(2.0, 2.0, ROWS)
    own = np.random.default_rng(seed).normal(shift, noise, ROWS)
    return [(float(10 * (a + b)), 10) for a, b in zip(difficulty, own, strict=True)]


def measured(number: int, *shifts: float, is_final: bool = False, problem: str = "", **settings: str) -> TrialSoFar:
    rungs = [
        TrialLosses(
            step=4 * 2**i,
            is_final=is_final and shift == shifts[-1],
            losses=tuple(rows(shift, seed=number)),
            seconds=1.0,
        )
        for i, shift in enumerate(shifts)
    ]
    if problem:
        rungs.append(TrialLosses(step=0, is_final=False, losses=(), seconds=1.0, problem=problem))
    return TrialSoFar(number=number, settings=settings, run=f"trials/{number:02}", rungs=tuple(rungs))


def test_rungs_double_up_to_the_whole_run() -> None:
    assert plan_rungs(1, 100) == [1]
    assert plan_rungs(2, 100) == plan_rungs(3, 100) == [0.5, 1]
    assert plan_rungs(4, 100) == [0.25, 0.5, 1]
    assert plan_rungs(24, 100) == [0.125, 0.25, 0.5, 1]
    assert [step_of(rung, 9) for rung in plan_rungs(4, 9)] == [3, 5, None]


def test_a_budget_makes_the_first_rung_shorter_but_not_shorter_than_some_steps() -> None:
    rungs = plan_rungs(24, 1000, run_seconds=100, budget=300)
    assert 24 * rungs[0] * 100 <= 100
    assert rungs[-1] == 1
    assert plan_rungs(24, 1000, run_seconds=100, budget=1e6) == plan_rungs(24, 1000)
    assert plan_rungs(24, 32, run_seconds=100, budget=1)[0] * 32 == 4


def test_a_difference_is_found_that_the_difficulty_of_the_rows_would_hide() -> None:
    one, other = rows(0.0), rows(0.05, seed=1)
    spread = np.std([total / count for total, count in one]) / ROWS**0.5
    assert spread > 0.2  # an unpaired comparison could not see 0.05
    (found,) = paired_differences([one, other])
    assert found.low > 0
    assert 0.03 < found.difference < 0.08
    assert found.difference == pytest.approx(mean_loss(other) - mean_loss(one))
    (back,) = paired_differences([other, one])
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    known = nll_record(one, other)["difference"]["nll"]
    assert (found.low, found.high) == pytest.approx((known["low"], known["high"]))
    (same,) = paired_differences([one, rows(0.0, seed=2)])
    assert same.low < 0 < same.high
    (wide,) = paired_differences([one, other], level=level_for(24))
    assert wide.low < found.low < found.high < wide.high
    with pytest.raises(ValueError, match="different rows"):
        paired_differences([one, [(1.0, 7)] * ROWS])


def test_at_most_half_go_on_and_of_these_the_second_quarter_only_if_it_may_be_the_best() -> None:
    far = {number: rows(0.5 * number, seed=number) for number in range(8)}
    assert choose_survivors(far) == [0, 1]
    near = {number: rows(0.0, seed=number) for number in range(8)}
    assert len(choose_survivors(near)) == 4
    assert choose_survivors({3: rows(0.0)}) == [3]
    assert choose_survivors({3: rows(0.3), 5: rows(0.0)}) == [5]
    assert choose_survivors({}) == []
    mixed = {0: rows(0.0), 1: rows(0.0, seed=1), 2: rows(2.0), 3: rows(3.0)}
    assert sorted(choose_survivors(mixed)) == [0, 1]
    assert choose_survivors({**mixed, 1: rows(1.0, seed=1)}) == [0]


def test_the_ranking_says_what_is_better_and_what_cannot_be_told_apart() -> None:
    trials = [
        measured(1, 0.5, **{"lora.r": "2"}),
        measured(2, 0.1, 0.0, is_final=True, **{"lora.r": "4"}),
        measured(3, 0.1, 0.0, is_final=True, **{"lora.r": "8"}),
        measured(4, problem="the loss is nan", **{"lora.r": "16"}),
        measured(5, **{"lora.r": "32"}),
    ]
    record = rank_trials(trials, waiting={5})
    where = {"folder": "f", "recipe": "r", "page": "p", "rungs": [0.5, 1.0]}
    parsed = SweepRecord.model_validate_json(json.dumps({**record, **where}))
    assert [(trial.number, trial.state) for trial in parsed.trials][2:] == [
        (1, "dropped"),
        (4, "failed"),
        (5, "waiting"),
    ]
    assert {trial.number for trial in parsed.trials[:2]} == {2, 3}
    assert parsed.state == "time is up"
    second, third = parsed.trials[1].to_best, parsed.trials[2].to_best
    assert second is not None
    assert third is not None
    assert second.low <= 0 < second.high
    assert third.step == 4  # compared where it was dropped
    assert third.value == pytest.approx(0.4, abs=0.05)
    text = " ".join(parsed.sentences)
    assert "cannot be told apart from r=" in text
    assert re.search(r"It beats r=2 by 0\.(39|4).* ± 0\.0\d+ nats \(step 4\)\.", text)
    assert "Failed: r=16." in text
    assert "few" not in text


def test_a_trial_that_was_ahead_where_it_ended_is_not_called_tied() -> None:
    """The best got furthest; a failed one may have been ahead of it."""
    record = rank_trials([measured(1, 1.0, 0.9, **{"lora.r": "2"}), measured(2, 0.2, **{"lora.r": "4"})], waiting={2})
    text = " ".join(record["sentences"])
    assert record["best"] == 1
    assert "cannot be told apart" not in text
    assert "r=4 was ahead of it" in text


def test_sensitivity_takes_many_numbers_in_thirds() -> None:
    trials = [
        measured(i, 0.1 * i, **{"train.learning_rate": f"{10.0**-i:.0e}", "lora.r": "48"[i % 2]}) for i in range(9)
    ]
    rate, r = sensitivity(trials)
    assert (rate["setting"], r["setting"]) == ("train.learning_rate", "lora.r")
    assert [value["num_trials"] for value in rate["values"]] == [3, 3, 3]
    assert rate["values"][0]["value"] == "1e-02 to 1e+00"
    assert rate["spread"] == pytest.approx(0.6, abs=0.05)
    assert sensitivity([measured(1)]) == []


def test_the_clock_counts_the_longest_trial_or_the_share_of_each_worker() -> None:
    assert by_clock([1.0, 2.0, 3.0], 1) == 6.0
    assert by_clock([1.0, 2.0, 3.0], 2) == 3.0
    assert by_clock([10.0, 1.0], 2) == 10.0
    assert by_clock([], 3) == 0.0


def test_several_workers_afford_a_longer_first_rung() -> None:
    assert plan_rungs(24, 1000, run_seconds=100, budget=300)[0] == 1 / 32
    assert plan_rungs(24, 1000, run_seconds=100, budget=300, at_once=4)[0] == 1 / 8
