"""Write docs/recipe.md from the recipe's own fields. `--check` only tests whether it is up to date."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pages import write_or_check
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loratune.recipe.recipe import Recipe, Source

PAGE = Path(__file__).parent / "recipe.md"
HEAD = """# The recipe

<!-- Written by docs/make_reference.py from src/loratune/recipe/recipe.py; run `make docs` to update it. -->

A recipe is a YAML file with up to six sections. Every setting has a default, and unknown names are errors. On the
command line, `section.field=value` overrides a setting. Numbers such as `1e-4` are read as numbers even without a
decimal point. `loratune schema` prints the JSON schema for editors.
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        parts += [f"## `{name}`: {_first_line(section)}\n", _table(section)]
    parts += ["## A source\n", "A source is a name, or a mapping with these fields:\n", _table(Source)]
    return "\n".join(parts)


def _table(section: type[BaseModel]) -> str:
    rows = ["| field | values | default | meaning |", "|---|---|---|---|"]
    properties = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        description = " ".join((field.description or "").split())
        choices = properties[name].get("enum")  # also those that are only known at run time, such as the tasks
        values = ", ".join(f"`{choice}`" for choice in choices) if choices else _type_in_words(field.annotation)
        values = values.replace("|", "\\|")
        rows.append(f"| `{name}` | {values} | {_default(field)} | {description} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    if isinstance(value, tuple) and value and isinstance(value[0], Source):
        return f"`{value[0].name}`, config `{value[0].config}`, split `{value[0].split}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{'null' if value is None else str(list(value)) if isinstance(value, tuple) else value}`"


def _type_in_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return _type_in_words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_in_words(part) for part in arguments if part is not type(None))
    if origin is tuple:
        return f"list of {_type_in_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_in_words(arguments[0])} to {_type_in_words(arguments[1])}"
    words = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Source: "source"}
    return words.get(annotation, str(annotation))


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
