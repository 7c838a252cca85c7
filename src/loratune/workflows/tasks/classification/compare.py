"""Base vs. fine-tuned for a classifier. The base has the head that training began with."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from loratune.data.examples import LabeledExample
from loratune.model.device import free_memory
from loratune.workflows.tasks.classification.measures import (
    CONTINUED,
    class_logits,
    classification_record,
    nll_of_labels,
)
from loratune.workflows.tasks.task import Compared, Comparison

if TYPE_CHECKING:
    from loratune.workflows.tasks.classification.loss import ClassificationLoss


def compare_classes(comparison: Comparison) -> Compared:
    """Measure the predicted classes of the same loaded model as it began and as it is."""
    data, budget, progress = comparison.prepared.data, comparison.budget, comparison.progress
    loss = cast("ClassificationLoss", comparison.loss)
    held_out = [example for example in data.eval if isinstance(example, LabeledExample)]
    loss.model.eval()
    free_memory()
    with comparison.before():
        base = class_logits(loss, held_out, budget, progress)
    tuned = class_logits(loss, held_out, budget, progress)
    counts = data.report["train"]["labels"]
    record = classification_record(
        names=data.report["labels"],
        examples=held_out,
        base=base,
        tuned=tuned,
        majority=max(counts, key=lambda name: counts[name]),
    )
    if comparison.started:
        record["note"] = CONTINUED
    return Compared(record=record, base_nll=nll_of_labels(base, held_out), tuned_nll=nll_of_labels(tuned, held_out))
