"""Base vs. fine-tuned classifier: accuracy, macro F1, loss, and the confusion matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from loratune.data.batch import collate
from loratune.evaluation.record import LEVEL, RESAMPLES, add_statistics, side_before
from loratune.run.errors import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loratune.data.examples import Example, LabeledExample
    from loratune.run.progress import Progress
    from loratune.training.token_budget import TokenBudget
    from loratune.workflows.tasks.classification.loss import ClassificationLoss

MEASURES = ("accuracy", "f1", "nll")
"""The reported measures, in order."""

UNTRAINED = (
    "the base model's head was never trained on these classes, so its answers are random; the majority "
    "class is the line to beat"
)
CONTINUED = "the run began with the head and the adapter of lora.start_from, which it is compared with"
_MOST_CLASSES = 20
"""The largest confusion matrix that a terminal shows."""

Numbers = np.ndarray[Any, np.dtype[np.float64]]
"""[n, k] or [k]."""


def class_logits(
    loss: ClassificationLoss, examples: Sequence[Example], budget: TokenBudget, progress: Progress
) -> torch.Tensor:
    """Return the logits of each example, float32 [n, C].

    Args:
        loss: The loss of the model, whose adapter is on or off.
        examples: The examples to classify.
        budget: Tokens of a micro-batch; halved if memory runs out.
        progress: Shows how far it is.

    Raises:
        MachineError: One example does not fit into memory.
    """
    was_training = loss.model.training
    loss.model.eval()

    def ask() -> torch.Tensor:
        rows: dict[int, torch.Tensor] = {}
        with progress.task("held-out classes", len(examples), "examples") as task:
            for chosen in budget.micro_batches(examples, range(len(examples))):
                logits = loss.logits(collate([examples[i] for i in chosen]).to(loss.model.device)).cpu()
                rows.update(zip(chosen, logits, strict=True))
                task.advance(len(chosen))
        return torch.stack([rows[i] for i in range(len(examples))])

    try:
        return budget.retry(ask, undo=lambda: None)
    finally:
        loss.model.train(was_training)


def nll_of_labels(logits: torch.Tensor, examples: Sequence[LabeledExample]) -> list[tuple[float, int]]:
    """Return (-log p of its class, 1) for each example, in the form in which `evaluate_nll` counts tokens; `logits`:
    [n, C]."""
    labels = torch.tensor([example.label for example in examples])
    return [(nll, 1) for nll in torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").tolist()]


def classification_record(
    *,
    names: Sequence[str],
    examples: Sequence[LabeledExample],
    base: torch.Tensor,
    tuned: torch.Tensor,
    majority: str,
) -> dict[str, Any]:
    """Return `evaluation.json` of a classifier.

    Args:
        names: The class names.
        examples: The held-out examples.
        base: Logits without the adapter and with the initial head, [n, C].
        tuned: Logits after training, [n, C].
        majority: The most frequent class of the training data.

    Returns:
        `base` and `tuned`, each with `accuracy`, `f1` (macro: the mean over the classes that occur among labels or
        predictions) and `nll` (nats per example); `difference` (tuned minus base) of each as `value`, `low`, `high`;
        `majority`, the scores of always predicting the most frequent class; `classes`, precision, recall and F1 of
        each; `confusion`, a row a true class with how often each class was predicted; `items`.
    """
    labels = torch.tensor([example.label for example in examples])
    sides = [_Side(logits, labels, len(names)) for logits in (base, tuned)]
    record: dict[str, Any] = {
        "metric": "accuracy",
        "task": "sequence_classification",
        "num_examples": len(examples),
        "base": {},
        "tuned": {},
        "difference": {},
    }
    width = 3 * len(names)
    one, other = (np.column_stack([side.counts, side.nll, np.ones(len(labels))]) for side in sides)
    add_statistics(
        record,
        one,
        other,
        {
            "accuracy": lambda sums: sums[:, : len(names)].sum(-1) / sums[:, width + 1],
            "f1": lambda sums: _f1(sums[:, :width]),
            "nll": lambda sums: sums[:, width] / sums[:, width + 1],
        },
    )
    common = torch.full_like(labels, list(names).index(majority))
    counts = _counts(common.numpy(), labels.numpy(), len(names)).sum(0, keepdims=True)
    accuracy, f1 = float((common == labels).double().mean()), float(_f1(counts)[0])
    record["majority"] = {"label": majority, "accuracy": accuracy, "f1": f1}
    record["note"] = UNTRAINED
    record["classes"] = list(_per_class(names, sides[1]))
    record["confusion"] = {
        "labels": list(names),
        **{side: part.confusion for side, part in zip(("base", "tuned"), sides, strict=True)},
    }
    record["interval"] = {"level": LEVEL, "method": "paired bootstrap", "resamples": RESAMPLES}
    record["items"] = [_item(example, names, sides, number) for number, example in enumerate(examples)]
    return record


class _Side:
    """The predictions of one model."""

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
        self.probabilities = logits.double().softmax(-1)
        self.predicted = logits.argmax(-1)
        self.labels = labels
        self.nll: Numbers = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()
        self.counts = _counts(self.predicted.numpy(), labels.numpy(), num_classes)
        matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
        np.add.at(matrix, (labels.numpy(), self.predicted.numpy()), 1)
        self.confusion: list[list[int]] = matrix.tolist()


def _counts(predicted: Any, labels: Any, num_classes: int) -> Numbers:
    """Return float64 [n, 3·C]: for each class whether an example is a true positive, a false positive or a false
    negative."""
    rows = np.arange(len(labels))
    counts = np.zeros((len(labels), 3, num_classes))
    right = predicted == labels
    counts[rows[right], 0, labels[right]] = 1
    counts[rows[~right], 1, predicted[~right]] = 1
    counts[rows[~right], 2, labels[~right]] = 1
    return counts.reshape(len(labels), 3 * num_classes)


def _f1(sums: Numbers) -> Numbers:
    """Return the macro F1 of each row of summed counts [m, 3·C].

    The mean of 2·TP / (2·TP + FP + FN) over the classes that occur among labels or predictions, as scikit-learn's
    `f1_score(average="macro")`.
    """
    hits, wrong, missed = np.moveaxis(sums.reshape(len(sums), 3, -1), 1, 0)
    weight = 2 * hits + wrong + missed
    each = np.divide(2 * hits, weight, out=np.zeros_like(weight), where=weight > 0)
    values: Numbers = each.sum(-1) / (weight > 0).sum(-1)
    return values


def _per_class(names: Sequence[str], side: _Side) -> Iterator[dict[str, Any]]:
    hits, wrong, missed = side.counts.sum(0).reshape(3, -1)
    for name, hit, false, lost in zip(names, hits, wrong, missed, strict=True):
        yield {
            "label": name,
            "num_examples": int(hit + lost),
            "precision": float(hit / (hit + false)) if hit + false else None,
            "recall": float(hit / (hit + lost)) if hit + lost else None,
            "f1": float(2 * hit / (2 * hit + false + lost)) if hit + false + lost else None,
        }


def _item(example: LabeledExample, names: Sequence[str], sides: Sequence[_Side], number: int) -> dict[str, Any]:
    """Return one example in the form of an answered prompt: the text, the true class, the predicted class."""
    text = "\n\n".join(example.texts)
    return {
        "file": example.origin.file,
        "line": example.origin.line,
        "prompt": text,
        "question": text,
        "reference": example.name,
        **{
            name: {
                "text": names[int(side.predicted[number])],
                "score": float(side.predicted[number] == example.label),
                "probability": float(side.probabilities[number].max()),
                "num_tokens": 0,
                "stopped": True,
            }
            for name, side in zip(("base", "tuned"), sides, strict=True)
        },
    }


def classification_table(record: Mapping[str, Any]) -> Table:
    """Return a table with a row a measure: base, majority class, fine-tuned, and the difference with its interval."""
    table = Table(
        title=f"Held-out: {plural(record['num_examples'], 'text')}",
        caption=f"{record['note']}.",
        caption_justify="left",
    )
    table.add_column("measure")
    level = f"{record['interval']['level']:.0%}"
    for column in (side_before(record), "majority", "fine-tuned", "difference", f"{level} interval"):
        table.add_column(column, justify="right")
    for name, words in (("accuracy", "accuracy"), ("f1", "F1 (macro)"), ("nll", "NLL per text")):
        is_share = name != "nll"
        difference, scale = record["difference"][name], 100 if is_share else 1
        plain, form, unit = (".1%", "+.1f", " points") if is_share else (".4g", "+.4g", "")
        low, high = (format(scale * difference[end], form) for end in ("low", "high"))
        table.add_row(
            words,
            format(record["base"][name], plain),
            format(record["majority"][name], plain) if is_share else "",
            format(record["tuned"][name], plain),
            f"{format(scale * difference['value'], form)}{unit}",
            f"{low} to {high}",
        )
    return table


def confusion_table(record: Mapping[str, Any]) -> Table | Text:
    """Return how often the fine-tuned model predicted each class, a row a true class."""
    names, rows = record["confusion"]["labels"], record["confusion"]["tuned"]
    if len(names) > _MOST_CLASSES:
        return Text(f"evaluation.json has the confusion matrix of the {len(names)} classes.")
    table = Table(title="Fine-tuned: true class (rows), predicted class (columns)")
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        cells = [Text(str(count) if count else "·", style="bold" if i == number else "") for i, count in enumerate(row)]
        table.add_row(Text(name), *cells)
    return table
