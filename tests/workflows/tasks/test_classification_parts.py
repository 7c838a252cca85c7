"""The parts of classification by themselves; `test_classification` runs them together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from loratune.data.batch import collate
from loratune.data.examples import LabeledExample
from loratune.data.rows.row import Origin, Row
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS
from loratune.training.event_log import EventLog
from loratune.training.token_budget import TokenBudget
from loratune.training.trainer import RunTrainer
from loratune.workflows.load import load_trained
from loratune.workflows.plan import plan
from loratune.workflows.tasks.classification import TASK
from loratune.workflows.tasks.classification.compare import compare_classes
from loratune.workflows.tasks.classification.load_back import ClassifierReader
from loratune.workflows.tasks.classification.loss import ClassificationLoss
from loratune.workflows.tasks.classification.prepare import classifier_positions
from loratune.workflows.tasks.classification.rows import labeled_texts
from loratune.workflows.tasks.classification.trl_trainer import TrlClassifierTrainer
from loratune.workflows.tasks.task import Comparison
from loratune.workflows.train import train
from tests.classifiers import bases, class_recipe

Bases = Callable[[str], Path]

__all__ = ["bases"]  # a fixture


def example(label: int, *ids: int) -> LabeledExample:
    return LabeledExample(
        input_ids=np.array(ids, np.int32),
        supervised=np.zeros(len(ids), np.bool_),
        origin=Origin(file="a.jsonl", line=1),
        label=label,
        name="ab"[label],
        token_types=None,
        texts=("a",),
    )


def test_rows_without_a_text_or_a_label_are_rejected_by_line() -> None:
    rows = [
        Row(file="a.jsonl", line=line, value=value)
        for line, value in enumerate(({"text": "x", "label": "a"}, {"text": "y"}, {"label": "a"}), 1)
    ]
    texts, rejected = labeled_texts(rows)
    assert [(text.text, text.name) for text in texts] == [("x", "a")]
    assert [row.origin.line for row in rejected] == [2, 3]


def test_positions_are_those_of_the_model(bases: Bases, tmp_path: Path) -> None:
    recipe = class_recipe(bases("bert"), tmp_path)
    prepared = plan(recipe)
    config = prepared.model.skeleton.config
    assert prepared.model.positions == classifier_positions(recipe, config) == config.max_position_embeddings
    config.is_encoder_decoder = True
    with pytest.raises(RecipeError, match="encoder with a decoder"):
        classifier_positions(recipe, config)


def test_the_base_and_the_tuned_side_of_a_comparison_are_the_adapter_off_and_on(bases: Bases, tmp_path: Path) -> None:
    recipe = class_recipe(bases("llama"), tmp_path, train__epochs=3, train__learning_rate=1e-2)
    run = train(recipe).run
    prepared = plan(recipe)
    model, loss = load_trained(prepared, run, NO_PROGRESS)
    assert isinstance(loss, ClassificationLoss)
    events = EventLog(run, NO_PROGRESS)
    compared = compare_classes(
        Comparison(
            prepared=prepared,
            model=model,
            started=False,
            before=model.disable_adapter,
            loss=loss,
            budget=TokenBudget(4096, events),
            events=events,
            progress=NO_PROGRESS,
            run=run,
        )
    )
    batch = collate([cast("LabeledExample", prepared.data.eval[0])])
    model.eval()
    with torch.no_grad():
        tuned = float(loss.sum(batch))
        with model.disable_adapter():
            base = float(loss.sum(batch))
    assert compared.tuned_nll[0] == (pytest.approx(tuned, rel=1e-4), 1)
    assert compared.base_nll[0] == (pytest.approx(base, rel=1e-4), 1)
    assert abs(base - tuned) > 1e-3, "the sides must differ, or a swap could not be seen"


def test_the_reference_engine_is_a_trainer_with_the_runs_order_of_examples() -> None:
    assert issubclass(TrlClassifierTrainer, RunTrainer)
    assert TASK.reference_trainer.__qualname__ == "Classification.reference_trainer"


def test_a_merged_classifier_has_no_stop_token_to_lose() -> None:
    assert ClassifierReader.ends_with(cast("ClassifierReader", None), 3)


def test_labels_are_collated_in_the_order_of_the_examples() -> None:
    batch = collate([example(0, 1, 2), example(1, 3)])
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1]
    assert batch.boundaries.tolist() == [0, 2, 3]
