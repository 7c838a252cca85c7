"""Score an answer against its reference: 1 correct, 0 wrong."""

from __future__ import annotations

import json
from decimal import Decimal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

from loratune.run.errors import DataError, MachineError
from loratune.run.extras import pip_install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from loratune.evaluation.generate import PromptLike


class _NotJsonError(ValueError):
    """Text that Python's parser accepts and the JSON standard does not, or an object with a key twice."""


def score(metric: str, answer: str, reference: str) -> float:
    """Score an answer.

    Args:
        metric: `exact_match`: the same text except for surrounding white space. `json`: the same JSON value and nothing
            else (1, true and "1" are three values, 1 and 1.0 are one; the order of keys does not matter). `contains`:
            the reference occurs in the answer.
        answer: The model's answer.
        reference: The answer in the held-out conversation.

    Raises:
        DataError: The metric is `json`, and the reference is not JSON.
        KeyError: There is no such metric.
    """
    return float(_METRICS[metric](answer.strip(), reference.strip()))


def check_metric(metric: str) -> None:
    """Check that the metric's package is installed.

    Raises:
        MachineError: It is not.
    """
    if metric == "bleu" and find_spec("sacrebleu") is None:
        raise MachineError("the metric is bleu, but sacrebleu is not installed", fix=pip_install("bleu"))


def check_references(metric: str, prompts: Iterable[PromptLike]) -> None:
    """Refuse references that no answer can match, or that every answer matches.

    Args:
        metric: A metric of `score`, or `none`.
        prompts: The held-out prompts.

    Raises:
        DataError: A reference is empty, or not JSON where the metric is `json`; the error names file and line.
    """
    if metric == "none":
        return
    for prompt in prompts:
        problem = next(filter(None, (_problem(metric, reference.strip()) for reference in prompt.references)), "")
        if problem:
            fix = "correct the row, or choose another metric"
            raise DataError(problem, fix=fix, file=prompt.origin.file, line=prompt.origin.line)


def _problem(metric: str, reference: str) -> str:
    if not reference:
        return "the reference answer is empty"
    if metric != "json":
        return ""
    try:
        _parse(reference)
    except _REFUSED as error:
        return f"the metric is json, but the reference {_shortened(reference)} is not JSON: {error}"
    return ""


def _same_json(answer: str, reference: str) -> bool:
    problem = _problem("json", reference)
    if problem:
        raise DataError(problem, fix="correct the row, or choose another metric")
    try:
        return _same_value(_parse(answer), _parse(reference))
    except _REFUSED:
        return False


def _same_value(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_value(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same_value, left, right))
    # In Python True == 1; in JSON it is not.
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def _parse(text: str) -> Any:
    # Decimal compares numbers as written, and 1e999 is not infinity.
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=Decimal)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _NotJsonError("an object has a key twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJsonError(f"{name} is not JSON")


def _shortened(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}…")


# ValueError: not JSON, or an integer of thousands of digits; RecursionError: brackets nested thousands deep;
# ArithmeticError: an exponent beyond those of Decimal.
_REFUSED = (ValueError, RecursionError, ArithmeticError)

_METRICS: Mapping[str, Callable[[str, str], bool]] = {
    "exact_match": lambda answer, reference: answer == reference,
    "json": _same_json,
    "contains": lambda answer, reference: reference in answer,
}
SCORED = tuple(_METRICS)
"""The metrics of `score`."""
