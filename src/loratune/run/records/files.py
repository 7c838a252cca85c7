"""Records on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import RunError
from loratune.run.records.base import AnyPart, as_json, parse, parse_known
from loratune.run.records.metrics import EvaluationLine, EventLine, StepLine, parse_metrics_line


def write_record(path: Path, model: type[BaseModel], values: Any) -> Any:
    """Write a record, or nothing if its values do not fit the model; return it as it was written.

    Raises:
        ValidationError: A field is missing, unknown or of another type, which is a mistake of ours.
        MachineError: The file cannot be written.
    """
    written = as_json(parse(model, values))
    write_json(path, written)
    return written


def read_record(path: Path, model: type[AnyPart]) -> AnyPart:
    """Read a record. Fields that this version does not know are ignored.

    Raises:
        RunError: The file is missing, damaged, or contains something else.
    """
    values = read_json(path)
    try:
        return parse_known(model, values)
    except ValidationError as error:
        raise _other_version(path, error) from None


def read_metrics(run: RunDir) -> list[StepLine | EvaluationLine | EventLine]:
    """Read all lines of `metrics.jsonl`. Fields that this version does not know are ignored.

    Raises:
        RunError: A line is none.
    """
    try:
        return [parse_metrics_line(json.dumps(line), lenient=True) for line in run.read_metrics()]
    except ValidationError as error:
        raise _other_version(run.metrics, error) from None


def _other_version(path: Path, error: ValidationError) -> RunError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return RunError(
        f"not a record that this version of loratune writes: {where}: {first['msg']}",
        file=path,
        fix="use the version of loratune that wrote it",
    )
