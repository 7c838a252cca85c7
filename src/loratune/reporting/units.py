"""Numbers as people read them, with their units."""

from __future__ import annotations


def as_bytes(number: float) -> str:
    """1,048,576 → 1.0 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"


def as_duration(seconds: float) -> str:
    """4000 → 1 h 6 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def as_ratio(measured: float, promised: float) -> str:
    """95 of 100 → 95%; 2000 of 100 → 20 ×; empty where nothing was promised."""
    if not promised:
        return ""
    return f"{measured / promised:,.0f} ×" if measured >= 10 * promised else f"{measured / promised:.0%}"


def as_number(value: float, sign: str = "") -> str:
    """Four digits, and never an exponent for a large number."""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"


_NUMBERS = ("nll", "perplexity", "bleu")
"""Measures that are no shares of answers."""


def is_graded(metric: str) -> bool:
    """Whether answers are not right or wrong by the metric, but better or worse."""
    return metric == "bleu"


def as_measure(name: str, value: float) -> str:
    """A share as a percentage, a loss or BLEU as a number."""
    return as_number(value) if name in _NUMBERS else f"{value:.1%}"


def as_difference(name: str, value: float) -> str:
    """A difference of two measures, with its sign."""
    return as_number(value, "+") if name in _NUMBERS else f"{100 * value:+.1f} points"


def measure_in_words(name: str) -> str:
    """What a measure is called on a page."""
    return {
        "nll": "held-out loss",
        "perplexity": "perplexity",
        "exact_match": "exact match",
        "json": "right JSON",
        "contains": "contains the reference",
        "bleu": "BLEU",
        "accuracy": "accuracy",
        "f1": "F1 (macro)",
    }.get(name, name)
