from __future__ import annotations

from pathlib import Path

import pytest

from loratune.run.directory import RunDir
from loratune.run.progress import NoProgress
from loratune.training.event_log import EventLog
from loratune.training.held_out_loss import EvaluationStoppedError, evaluate_nll, loss_of_each, mean_nll
from loratune.training.token_budget import TokenBudget
from tests.training.test_layers import example, loss_of

EXAMPLES = [example(n) for n in (9, 30, 4, 12)]


def test_the_mean_weighs_tokens_and_not_examples() -> None:
    assert mean_nll([(10.0, 1), (30.0, 9)]) == 4
    assert mean_nll([]) == 0


def test_the_held_out_loss_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    loss = loss_of(2, compiled=False, recomputed=0)
    events = EventLog(RunDir.create(tmp_path / "run", overwrite=False), NoProgress())
    alone, together = (evaluate_nll(loss, EXAMPLES, TokenBudget(tokens, events), NoProgress()) for tokens in (1, 1000))
    assert [count for _, count in alone] == [8, 29, 3, 11], "nothing predicts the first token"
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    means = [total / count for total, count in alone]
    assert loss_of_each(loss, EXAMPLES) == pytest.approx(means, rel=1e-5)
    assert loss.model.training, "an evaluation leaves the mode as it was"


def test_an_evaluation_stops_between_micro_batches(tmp_path: Path) -> None:
    loss = loss_of(2, compiled=False, recomputed=0)
    events = EventLog(RunDir.create(tmp_path / "run", overwrite=False), NoProgress())
    with pytest.raises(EvaluationStoppedError):
        evaluate_nll(loss, EXAMPLES, TokenBudget(1, events), NoProgress(), stop=lambda: True)
