"""The recipe as text beside its form: the schema says which fields there are, and a field changes its place in it.

The text is the recipe. Comments and order stay when a field is changed; the result is compared with the intended
settings, and if a text is written in a way that this cannot edit, it is written out again without its comments.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import yaml

from loratune.recipe.recipe import Recipe
from loratune.recipe.schema import recipe_schema
from loratune.recipe.yaml import apply_override, parse_yaml, read_settings
from loratune.run.errors import RecipeError

MAIN = (
    *("model.name", "train.output_dir", "train.epochs", "train.learning_rate", "train.batch_size"),
    *("lora.r", "lora.alpha", "lora.targets", "data.max_length", "data.eval", "evaluate.metric"),
    "evaluate.samples_every",
)
"""The settings that are shown first; all others are folded away by section."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormField:
    """A setting in the form.

    Attributes:
        name: `section.field`.
        value: Its value in YAML; empty if the recipe does not set it.
        default: What counts then, in YAML.
        choices: Its only values, or values to choose from.
        closed: Whether it takes no others.
        description: The field's docstring.
    """

    name: str
    value: str
    default: str
    choices: tuple[str, ...]
    closed: bool
    description: str


def form_of(text: str) -> tuple[list[FormField], dict[str, list[FormField]]]:
    """Return the main fields, and the others by section, with the values of a recipe.

    Raises:
        RecipeError: The text is not a recipe's YAML.
    """
    values, _ = read_settings(text, None)
    schema = recipe_schema()
    task = (values.get("model") or {}).get("task", "causal_lm") if isinstance(values.get("model"), dict) else ""
    fields: dict[str, FormField] = {}
    for section, info in Recipe.model_fields.items():
        part: Any = info.annotation
        if part.only_for not in ("", task):
            continue
        given = values.get(section)
        for name, found in schema["$defs"][part.__name__]["properties"].items():
            full = f"{section}.{name}"
            fields[full] = _field(full, found, given if isinstance(given, dict) else {})
    rest: dict[str, list[FormField]] = {}
    for full, field in fields.items():
        if full not in MAIN:
            rest.setdefault(full.partition(".")[0], []).append(field)
    return [fields[name] for name in MAIN], rest


def _field(name: str, found: dict[str, Any], given: dict[str, Any]) -> FormField:
    parts = [found, *found.get("anyOf", ())]
    choices = [choice for part in parts for choice in part.get("enum", ())]
    choices += [part["const"] for part in parts if "const" in part]
    kinds = {part.get("type") for part in parts}
    if "boolean" in kinds:
        choices = [True, False, *choices]
    field = name.partition(".")[2]
    return FormField(
        name=name,
        value=_flow(given[field]) if field in given else "",
        default=_flow(found.get("default")),
        choices=tuple(map(_flow, choices)),
        closed=bool(choices) and not kinds & {"integer", "number", "array", "object"} and not _takes_any(parts),
        description=" ".join(found.get("description", "").split()),
    )


def _takes_any(parts: list[dict[str, Any]]) -> bool:
    """Return whether any text is allowed beside the choices."""
    return any(p.get("type") == "string" and not {"enum", "const"} & p.keys() for p in parts)


def set_field(text: str, name: str, value: str) -> str:
    """Return a recipe's text with another value of a setting, leaving everything else unchanged.

    Args:
        text: The recipe.
        name: `section.field`.
        value: The value in YAML; empty for the default.

    Raises:
        RecipeError: The text is not YAML, or there is no such setting.
    """
    section, _, field = name.partition(".")
    info = Recipe.model_fields.get(section)
    part: Any = info.annotation if info is not None else None
    if part is None or field not in part.model_fields:
        raise RecipeError(f"{name} is not a setting", fix="reload the page")
    wanted, _ = read_settings(text, None)
    if not value.strip():
        value = _flow(part().model_dump(mode="json")[field])
    apply_override(wanted, f"{name}={value}", {})
    edited = _edited(text, section, field, _flow(wanted[section][field]))
    try:
        if edited is not None and read_settings(edited, None)[0] == wanted:
            return edited
    except RecipeError:
        pass
    return yaml.safe_dump(copy.deepcopy(wanted), sort_keys=False, allow_unicode=True)


def _edited(text: str, section: str, field: str, value: str) -> str | None:
    """Return the text with the value in its place, if it is written as blocks."""
    root, _ = parse_yaml(text)
    pairs = root.value if isinstance(root, yaml.MappingNode) and not root.flow_style else None
    if pairs is None:
        return None if text.strip() and root is not None else f"{text}{section}:\n  {field}: {value}\n"
    inner = next((node for key, node in pairs if key.value == section), None)
    if inner is None:
        return f"{text.rstrip()}\n\n{section}:\n  {field}: {value}\n"
    if not isinstance(inner, yaml.MappingNode) or inner.flow_style or not inner.value:
        return None
    for key, node in inner.value:
        if key.value == field:
            return f"{text[: key.end_mark.index]}: {value}{text[_end(node) :]}"
    end = text.find("\n", _end(inner))
    end = len(text) if end < 0 else end
    indent = " " * inner.value[0][0].start_mark.column
    return f"{text[:end]}\n\n{indent}{field}: {value}{text[end:] or chr(10)}"


def _end(node: yaml.Node) -> int:
    """Return where a value ends; PyYAML's own mark of a block is the start of what follows it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return text.removesuffix("...\n").strip()
