"""Pydantic's validation errors, translated to ours: the setting, its value, its line, the nearest known name."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from loratune.recipe.other_names import named_here, value_here
from loratune.run.errors import RecipeError

ON_COMMAND_LINE = 0
"""The line of a setting that was overridden, and is in no file."""

_SETTING = re.compile(r"\b[a-z]+\.[a-z_]+")
"""The full name of a setting in a message."""


def shown(value: Any, max_characters: int = 200) -> str:
    """Return a value as text for an error message."""
    if isinstance(value, bool):
        return str(value).lower()  # as YAML writes it
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a thousand levels of lists
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= max_characters else f"{text[: max_characters - 3]}..."


def translate_validation_error(
    error: ValidationError,
    recipe: type[BaseModel],
    source: type[BaseModel],
    file: str | Path | None,
    lines: dict[str, int],
) -> RecipeError:
    """Return the first problem of a validation error as a `RecipeError`.

    Args:
        error: The error to translate.
        recipe: The model that was validated, whose fields are sections.
        source: The model of the values below a section's field: a data source.
        file: The file to name in the message.
        lines: The line of each `section.field`; `ON_COMMAND_LINE` for one that was overridden.
    """
    told = _translate(error, recipe, source, lines)
    line = told.line
    file, line = ("command line", None) if line == ON_COMMAND_LINE else (file, line)
    return RecipeError(told.problem, file=file, line=line, fix=told.fix)


def _translate(
    error: ValidationError, recipe: type[BaseModel], source: type[BaseModel], lines: dict[str, int]
) -> RecipeError:
    first = error.errors()[0]
    if first["type"] == "missing":  # probably because it is misspelt, which says more
        first = next((item for item in error.errors() if item["type"] == "extra_forbidden"), first)
    location = [str(part) for part in first["loc"]]
    name = ".".join(location[:2])
    line = lines.get(".".join(location), lines.get(name))
    if first["type"] == "extra_forbidden":
        known = _known_names(recipe, source, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        fix = named_here(location[-1]) or _home(recipe, location) or fix
        return RecipeError(f"unknown setting {'.'.join(location)}", line=line, fix=fix)
    if first["type"] == "value_error":
        raised = first["ctx"]["error"]
        mentioned = [lines[setting] for setting in _SETTING.findall(str(raised)) if setting in lines]
        return RecipeError(
            str(raised), line=next(iter(mentioned), line), fix=getattr(raised, "fix", "see docs/recipe.md")
        )
    problems = {item["msg"] for item in error.errors() if [str(p) for p in item["loc"]][:2] == location[:2]}
    field, name = _innermost(recipe, source, location)
    description = " ".join((field.description or "").split()) if field is not None else ""
    said = "; or ".join(sorted(problems)).replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
    return RecipeError(
        f"{name} is {shown(first['input'])}: {said}",
        line=line,
        fix=" ".join(filter(None, (_suggestion(name, first["input"], said) or _example(name, field), description))),
    )


def _home(recipe: type[BaseModel], location: list[str]) -> str:
    """Return where a setting belongs that was written at the top or in another section; empty if it is unknown."""
    sections = {name: _section_of(recipe, name) for name in recipe.model_fields} if len(location) <= 2 else {}
    homes = [f"{name}.{location[-1]}" for name, part in sections.items() if part and location[-1] in part.model_fields]
    return f"here it is {' or '.join(homes)}" if homes else ""


def _suggestion(name: str, value: Any, said: str) -> str:
    if not isinstance(value, str):
        return ""
    if here := value_here(name, value):
        return f"{name}={here}."
    near = difflib.get_close_matches(value.lower(), re.findall(r"'([^']+)'", said), n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"Write {name}: [{value}], a list with one entry." if said == "Input should be a list" else ""


def _example(name: str, field: Any) -> str:
    """Return the default as an example of a value that is valid."""
    default = getattr(field, "default", None)
    if not isinstance(default, str | int | float) or name.count(".") != 1:
        return ""
    return f"For example {name}={shown(default) if isinstance(default, bool) else default}, the default."


def _innermost(recipe: type[BaseModel], source: type[BaseModel], location: list[str]) -> tuple[Any, str]:
    """Return the invalid field and its full name, also where it lies deeper than a section's field."""
    field, name = _field_of(recipe, location), ".".join(location[:2])
    if field is not None and get_origin(field.annotation) is dict and len(location) == 3:
        return field, f"{name}.{location[2]}"  # the key of a mapping, such as lora.rank_pattern.q_proj
    if len(location) > 2 and location[-1] in source.model_fields:
        numbers = [part for part in location[2:-1] if part.isdigit()]  # data.train.0.weight
        return source.model_fields[location[-1]], ".".join([name, *numbers, location[-1]])
    return field, name


def _section_of(recipe: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = recipe.model_fields.get(name)
    return field.annotation if field is not None and isinstance(field.annotation, type) else None


def _known_names(recipe: type[BaseModel], source: type[BaseModel], location: list[str]) -> list[str]:
    if not location:
        return list(recipe.model_fields)
    if len(location) > 1:
        return list(source.model_fields)
    section = _section_of(recipe, location[0])
    return list(section.model_fields) if section is not None else []


def _field_of(recipe: type[BaseModel], location: list[str]) -> Any:
    section = _section_of(recipe, location[0]) if location else None
    return section.model_fields.get(location[1]) if section is not None and len(location) > 1 else None
