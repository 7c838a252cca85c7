"""Numbers with their units, for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratune.run.records.evaluation import DifferenceRecord


def as_bytes(number: float) -> str:
    """Format bytes: 1,048,576 → 1.0 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"


def as_duration(seconds: float) -> str:
    """Format seconds: 4000 → 1 h 6 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def unbroken(text: str) -> str:
    """Return a text that a page does not break into lines, such as 2 min 21 s."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def as_path(path: str | Path) -> str:
    """Write a path with `~` for the home folder, whose name is often a person's."""
    home, path = str(Path.home()), str(path)
    return f"~{path[len(home) :]}" if path == home or path.startswith(f"{home.rstrip('/')}/") else path


def as_ratio(actual: float, planned: float) -> str:
    """Format actual / planned: 95 of 100 → 95%; 2000 of 100 → 20 ×; empty if nothing was planned."""
    if not planned:
        return ""
    return f"{actual / planned:,.0f} ×" if actual >= 10 * planned else f"{actual / planned:.0%}"


def as_number(value: float, sign: str = "") -> str:
    """Format with four digits, without an exponent for large numbers."""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"


_NUMBERS = ("nll", "perplexity", "bleu", "pair_margin", "label_margin")
"""Measures that are not fractions of answers."""


def is_graded(metric: str) -> bool:
    """Return whether the metric grades answers instead of calling them correct or wrong."""
    return metric == "bleu"


def is_marked(metric: str) -> bool:
    """Return whether the metric calls answers correct or wrong."""
    return metric != "none" and not is_graded(metric)


def as_measure(name: str, value: float) -> str:
    """Format a fraction as a percentage, a loss or BLEU as a number."""
    return as_number(value) if name in _NUMBERS else f"{value:.1%}"


def as_difference(name: str, value: float) -> str:
    """Format the difference of two measures, with its sign."""
    return as_number(value, "+") if name in _NUMBERS else f"{100 * value:+.1f} points"


def as_interval(name: str, difference: DifferenceRecord) -> str:
    """Format the interval of a difference: `-0.12 to +0.03`; empty if it has none."""
    if difference.low is None or difference.high is None:
        return ""
    low, high = (as_difference(name, end).removesuffix(" points") for end in (difference.low, difference.high))
    return f"{low} to {high}"


def measure_in_words(name: str) -> str:
    """Return a measure's name for people."""
    return {
        "nll": "held-out loss",
        "perplexity": "perplexity",
        "exact_match": "exact match",
        "json": "JSON correct",
        "contains": "contains the reference",
        "bleu": "BLEU",
        "accuracy": "accuracy",
        "f1": "F1 (macro)",
        "pair_accuracy": "chosen answer likelier",
        "pair_accuracy_per_token": "chosen answer likelier per token",
        "pair_margin": "margin of log p, nats",
        "label_margin": "log p per token, good minus bad answers, nats",
    }.get(name, name)
