"""The data mixture: which of several sources the examples come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.data.batch import num_supervised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.examples import Example


def held_out_groups(examples: Sequence[Example], report: dict[str, Any]) -> dict[str, list[int]]:
    """Return source → the numbers of its held-out examples; examples held out from training data have its sources.

    Args:
        examples: Held-out examples.
        report: The data report.

    Returns:
        Empty if there are fewer than two sources.
    """
    if not examples:
        return {}
    sources = report["eval"]["sources"]
    found = _groups(examples, report["train"]["sources"] if "held_out" in sources[0] else sources)
    return found if len(found) > 1 else {}


def source_of_file(report: dict[str, Any]) -> dict[str, str]:
    """Return file → source of the training examples; empty if there is only one source."""
    found = _of_file(report["train"]["sources"])
    return found if len(set(found.values())) > 1 else {}


def mixture(examples: Sequence[Example], report: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """Return the share of each training source in an epoch: examples, tokens, and trained tokens.

    Args:
        examples: Training examples, repeated by the weights of their sources; of streamed data, a sample.
        report: The data report.
        scale: Training examples per example in `examples`.
    """
    weights: dict[str, float] = {}
    for source in report["train"]["sources"]:
        weights.setdefault(_name(source), source["weight"])
    return [
        {
            "name": name,
            "weight": weights[name],
            "num_examples": round(scale * len(numbers)),
            "num_tokens": round(scale * sum(len(examples[i].input_ids) for i in numbers)),
            "num_supervised_tokens": round(scale * sum(num_supervised(examples[i]) for i in numbers)),
        }
        for name, numbers in _groups(examples, report["train"]["sources"]).items()
    ]


def _groups(examples: Sequence[Example], sources: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Return source → example numbers, in the order of the sources."""
    of_file = _of_file(sources)
    found: dict[str, list[int]] = {_name(source): [] for source in sources}
    for number, example in enumerate(examples):
        found[of_file[example.origin.file]].append(number)
    return {name: numbers for name, numbers in found.items() if numbers}


def _of_file(sources: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return file → source; a file of several sources belongs to the first."""
    of_file: dict[str, str] = {}
    for source in sources:
        for file in source["sha256"]:
            of_file.setdefault(file, _name(source))
    return of_file


def _name(source: dict[str, Any]) -> str:
    return ":".join(part for part in (source["name"], source["config"], source["split"]) if part)
