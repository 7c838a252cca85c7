"""What all records share: strict types, a version, and the way from and to JSON.

Records are validated as JSON, in the form in which they are kept: a number in quotes, a missing field and a field that
no model declares are errors when a file is written. Readers are lenient where it helps (`read_valid_parts`): a page
about a damaged run shows what can still be read.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

SCHEMA_VERSION = 1
"""Raised when a field changes its meaning or disappears; a new field needs no new version."""


class Part(BaseModel):
    """An object inside a record: immutable, strict about names and types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class Place(Part):
    """Where a row is."""

    file: str
    """File or Hub dataset."""
    line: int | None
    """Line or row, counted from 1; null if rows have no number."""


class RejectedRow(Place):
    """A row that cannot be trained on."""

    reason: str
    """What is wrong with it."""


class FileRecord(Part):
    """A record by itself: a file of a run, or what a verb prints."""

    schema_version: int = SCHEMA_VERSION
    """Version of the record's fields."""

    @model_validator(mode="after")
    def _always_write_the_version(self) -> Self:
        self.__pydantic_fields_set__.add("schema_version")
        return self


AnyPart = TypeVar("AnyPart", bound=BaseModel)


def parse(model: type[AnyPart], values: Any) -> AnyPart:
    """Return the record of JSON values.

    Raises:
        ValidationError: A field is missing, unknown or of another type.
    """
    return model.model_validate_json(json.dumps(values))


def parse_known(model: type[AnyPart], values: Any) -> AnyPart:
    """Return the record of JSON values without the fields that this version does not know.

    Raises:
        ValidationError: A field is missing or of another type.
    """
    try:
        return parse(model, values)
    except ValidationError:  # ignoring fields would also drop those that a task adds, so it comes second
        return model.model_validate_json(json.dumps(values), extra="ignore")


def as_json(record: BaseModel) -> Any:
    """Return the record as JSON values. Fields that were never given are left out."""
    return record.model_dump(mode="json", by_alias=True, exclude_unset=True)


def read_valid_parts(model: type[AnyPart], values: dict[str, Any]) -> AnyPart:
    """Return a record with all fields that are valid, however deep; reading another one is an AttributeError.

    Args:
        model: The record's type.
        values: JSON values, of a damaged file or of another version of loratune.
    """
    try:
        return parse_known(model, values)
    except ValidationError:
        found, wrong = {}, []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if key not in values:
            continue
        try:
            found[name] = _read_field(field, values[key])
        except ValidationError:
            wrong.append(name)
    record = model.model_construct(_fields_set=set(found), **found)
    for name in wrong:  # a default in its place would hide the damage
        record.__dict__.pop(name, None)
    return record


def _read_field(field: FieldInfo, value: Any) -> Any:
    inner = field.annotation
    if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
        return read_valid_parts(inner, value)
    annotated: Any = Annotated[inner, field]
    return TypeAdapter(annotated).validate_json(json.dumps(value), extra="ignore")
