"""What all engines share must be ours, not the libraries', whatever their order of inheritance."""

from __future__ import annotations

import pytest

from loratune.training.fast_trainer import FastTrainer
from loratune.training.trainer import RunTrainer
from loratune.training.trl_trainer import TrlTrainer

SHARED = (
    "create_optimizer",
    "evaluate",
    "log",
    "_get_grad_norm",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "floating_point_ops",
)


@pytest.mark.parametrize("engine", [FastTrainer, TrlTrainer])
@pytest.mark.parametrize("name", SHARED)
def test_an_engine_has_the_shared(engine: type[RunTrainer], name: str) -> None:
    assert getattr(engine, name) is vars(RunTrainer)[name]
