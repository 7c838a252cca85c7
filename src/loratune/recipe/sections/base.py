"""What all sections share: the strict base class, the number types, and data sources."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of the recipe: immutable, and strict about names and types."""

    only_for: ClassVar[str] = ""
    """The one task that has this section; empty for a section of every task."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def _refuse_boolean(value: Any) -> Any:
    # Pydantic's lax mode reads true as 1. Its `Strict` would refuse that, but also 1e3 and 8.0 for a number of steps.
    if isinstance(value, bool):
        raise PydanticCustomError(
            "number_type", "expected a number, not true or false (YAML also reads yes, no, on and off as these)"
        )
    return value


Int = Annotated[int, BeforeValidator(_refuse_boolean)]
Float = Annotated[float, BeforeValidator(_refuse_boolean)]
Cadence = Literal["epoch", "never"] | Int | Float


class Source(Section):
    """Where rows come from."""

    name: str
    """A file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`, `.xlsx`), a folder of such files, or the id of a Hugging
    Face Hub dataset."""

    config: str | None = None
    """The configuration (subset) of a Hub dataset: the `name` argument of `load_dataset`."""

    split: str | None = None
    """The split of a Hub dataset. Default: `train`."""

    weight: Float = Field(default=1.0, gt=0)
    """How many times each row is seen per epoch (oversampling or undersampling). 2.5 uses every row twice, and a
    random half of them, fixed by the seed, a third time; the half is the same in every epoch."""


class Contradiction(ValueError):
    """Settings that contradict each other; a `ValueError`, since pydantic collects these.

    Args:
        problem: The settings by their full names, and their values.
        fix: What the user can do about it.
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


def check_every(name: str, value: str | float) -> None:
    """Check that a number is one of steps, or a fraction of the run.

    Raises:
        Contradiction: It is neither.
    """
    if not isinstance(value, str) and (value <= 0 or (isinstance(value, float) and value >= 1 and value != int(value))):
        raise Contradiction(
            f"{name} is {value}, neither a number of steps nor a fraction",
            fix="use a number of steps, a fraction of the run below 1, epoch or never",
        )


def as_source(value: Any) -> Any:
    """Turn a bare name into a source."""
    return {"name": value} if isinstance(value, str) else value


def as_sources(value: Any) -> Any:
    """Turn one source, or a list of them, into a tuple of sources."""
    if isinstance(value, list | tuple):
        return tuple(as_source(item) for item in value)
    return value if isinstance(value, bool) else (as_source(value),)  # shown in the error as it was written


def as_sources_or_setting(value: Any) -> Any:
    """Leave `auto`, `none` and fractions as they are; read everything else as sources."""
    if value in ("auto", "none") or (isinstance(value, float | int) and not isinstance(value, bool)):
        return value
    return as_sources(value)


WrittenSources = str | Source | tuple[str | Source, ...]
"""What a recipe may write for sources, for the JSON schema: a name, a source, or a list of these."""

Sources = Annotated[tuple[Source, ...], BeforeValidator(as_sources, json_schema_input_type=WrittenSources)]
