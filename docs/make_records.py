"""Write docs/records.md from the records' own fields. `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pages import write_or_check
from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo

from loratune.run.records.certificate import CertificateRecord
from loratune.run.records.data import DataRecord
from loratune.run.records.evaluation import EvaluationRecord
from loratune.run.records.lock import LockRecord
from loratune.run.records.metrics import EvaluationLine, EventLine, StepLine
from loratune.run.records.plan import PlanRecord
from loratune.run.records.preview import PreviewRecord
from loratune.run.records.schemas import OUTPUTS

PAGE = Path(__file__).parent / "records.md"
HEAD = """# The records of a run

<!-- Written by docs/make_records.py from src/loratune/run/records/; run `make docs` to update it. -->

Every file in a run directory has a fixed set of fields, which this page lists with types and units. They are
checked when a file is written. `schema_version` increases when a field changes its meaning or disappears, but not
when a field is added.

    plan.json        planned numbers, later also measured     metrics.jsonl     one line per step, evaluation or event
    lock.json        every effective setting and input        evaluation.json   base vs. fine-tuned
    data.json        the data report                          parity.json       certificates of exports
    preview.json     the first training examples

`--json` prints the same records. `loratune schema VERB` prints the JSON schema of what a verb prints; `loratune
schema` prints that of a recipe ([its reference](recipe.md)). Fields marked *optional* may be missing.
"""

FILES: dict[str, tuple[type[BaseModel], ...]] = {
    "plan.json": (PlanRecord,),
    "lock.json": (LockRecord,),
    "data.json": (DataRecord,),
    "metrics.jsonl": (StepLine, EvaluationLine, EventLine),
    "evaluation.json": (EvaluationRecord,),
    "parity.json": (CertificateRecord,),
    "preview.json": (PreviewRecord,),
}


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    seen: set[type[BaseModel]] = set()
    for name, models in FILES.items():
        parts.append(f"## {name}\n")
        for model in models:
            parts += _with_parts(model, seen)
    parts.append("## With --json\n")
    verbs: dict[type[BaseModel], list[str]] = {}
    for verb, model in OUTPUTS.items():
        verbs.setdefault(model, []).append(verb)
    for model in verbs:
        parts += _with_parts(model, seen)
    return "\n".join(parts)


def _with_parts(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """Yield the table of a record, then those of its parts that are not on the page yet."""
    if model in seen:
        return
    seen.add(model)
    description = " ".join((model.__doc__ or "").split())
    yield f"### {model.__name__}\n\n{description}\n"
    if issubclass(model, RootModel):
        yield f"A {_type_in_words(model.model_fields['root'].annotation)}.\n"
    else:
        yield _table(model)
    for field in model.model_fields.values():
        for part in _models_in(field.annotation):
            yield from _with_parts(part, seen)


def _table(model: type[BaseModel]) -> str:
    rows = ["| field | type | |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        description = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{field.alias or name}` | {_type_of(name, field)} | {description} |")
    return "\n".join(rows) + "\n"


def _type_of(name: str, field: FieldInfo) -> str:
    annotation = field.annotation
    optional = not field.is_required() and name != "schema_version"  # which is always written
    if optional and field.default is None:  # missing rather than null
        (annotation,) = [part for part in get_args(annotation) if part is not type(None)] or [annotation]
    return _type_in_words(annotation) + (", *optional*" if optional else "")


def _type_in_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_in_words(part) for part in arguments)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type_in_words(arguments[0])}"
    if origin is dict:
        return f"object of {_type_in_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    words = {int: "integer", float: "number", str: "text", bool: "boolean", type(None): "null", Any: "any value"}
    return words[annotation]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
