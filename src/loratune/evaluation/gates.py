"""Check thresholds on measured numbers, such as `json>=0.8` or `difference.nll.high<0`, for an exit code in CI."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from loratune.run.errors import RecipeError, RunError, plural

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_GATE = re.compile(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")
_PARTS = ("base", "tuned", "difference", "forgetting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A threshold on one number.

    Attributes:
        text: The gate as given.
        name: The number's name: `tuned.json`, `difference.nll.low`. A bare measure such as `json` is that of the
            fine-tuned model.
        comparison: `>=`, `<=`, `>` or `<`.
        threshold: The number to compare with.
        option: The option that it was given with.
    """

    text: str
    name: str
    comparison: str
    threshold: float
    option: str = "--gate"


def parse_gate(text: str, option: str = "--gate") -> Gate:
    """Parse a gate that was given with an option.

    Raises:
        RecipeError: The text is not a gate.
    """
    found = _GATE.fullmatch(text)
    try:
        threshold = float(found[3]) if found else math.nan
    except ValueError:
        threshold = math.nan
    if found is None or not math.isfinite(threshold):
        raise RecipeError(
            f"{option} {text!r} is not a threshold", fix="NAME>=NUMBER with >=, <=, > or <, such as json>=0.8"
        )
    return Gate(text=text.strip(), name=found[1], comparison=found[2], threshold=threshold, option=option)


def check_names(gates: Iterable[Gate], measures: Sequence[str], *, forgetting: bool, harness: bool) -> None:
    """Refuse gates on numbers that will not be reported, before anything is measured.

    Args:
        gates: The gates.
        measures: The names of the measures on held-out data.
        forgetting: Whether `evaluate.forgetting` is measured too.
        harness: Whether tasks of lm-evaluation-harness run. Names of their numbers are known only afterwards.

    Raises:
        RecipeError: A name is unknown; the error suggests the nearest one.
    """
    sides = {"base": 0.0, "tuned": 0.0, "difference": {"value": 0.0, "low": 0.0, "high": 0.0}}
    reported: dict[str, Any] = {side: dict.fromkeys(measures, value) for side, value in sides.items()}
    if forgetting:
        reported["forgetting"] = {side: dict.fromkeys(("nll", "perplexity"), value) for side, value in sides.items()}
    known = reported_numbers(reported)
    for gate in gates:
        if not (harness and gate.name.startswith("harness.")):
            _find(known, gate)


def reported_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return every number of `evaluation.json` that a gate can name."""
    numbers: dict[str, float] = {}
    for part in _PARTS:
        _flatten(record.get(part, {}), part, numbers)
    for task, measures in record.get("harness", {}).get("tasks", {}).items():
        for measure, values in measures.items():
            _flatten(values, f"harness.{task}.{measure}", numbers)
            numbers[f"harness.{task}.{measure}"] = values["tuned"]
    return numbers | {
        name.removeprefix("tuned."): value for name, value in numbers.items() if name.startswith("tuned.")
    }


def pass_gates(gates: Iterable[Gate], record: dict[str, Any]) -> None:
    """Add each gate's number and whether it passed to the record.

    Raises:
        RecipeError: A gate names a number that was not reported.
    """
    numbers = reported_numbers(record)
    record["gates"] = [
        {
            "gate": gate.text,
            "value": _find(numbers, gate),
            "passed": _COMPARISONS[gate.comparison](_find(numbers, gate), gate.threshold),
        }
        for gate in gates
    ]


def check_gates(record: Mapping[str, Any]) -> None:
    """Raise where a gate failed.

    Raises:
        RunError: One or more gates failed; the error lists them with their numbers.
    """
    failed = [gate for gate in record.get("gates", ()) if not gate["passed"]]
    if failed:
        details = "; ".join(f"{gate['gate']} (got {gate['value']:.6g})" for gate in failed)
        total = plural(len(record["gates"]), "gate")
        raise RunError(f"{len(failed)} of {total} failed: {details}", fix="see evaluation.json")


def _flatten(value: Any, name: str, numbers: dict[str, float]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(inner, f"{name}.{key}", numbers)
    elif isinstance(value, int | float):
        numbers[name] = value
        numbers[name.removesuffix(".value")] = value  # `difference.nll` is short for `difference.nll.value`


def _find(numbers: Mapping[str, float], gate: Gate) -> float:
    if gate.name not in numbers:
        near = get_close_matches(gate.name, numbers, n=1)
        fix = f"did you mean {near[0]}?" if near else f"reported: {', '.join(sorted(numbers))}"
        raise RecipeError(f"{gate.option} {gate.text}: no number {gate.name} is reported", fix=fix)
    return numbers[gate.name]
