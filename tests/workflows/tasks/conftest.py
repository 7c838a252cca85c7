"""A classifier that was trained once."""

from __future__ import annotations

import pytest

from loratune.run.directory import RunDir
from loratune.workflows.train import train
from tests.classifiers import class_recipe, make_base


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A BERT that was trained on intents, with a checkpoint an epoch. Not to be changed."""
    base = make_base(tmp_path_factory.mktemp("base") / "bert", "bert")
    settings = {"train__epochs": 8, "train__learning_rate": 3e-3, "train__save_every": 100, "lora__dropout": 0.1}
    return train(class_recipe(base, tmp_path_factory.mktemp("finished"), num_rows=200, **settings)).run
