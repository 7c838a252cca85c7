"""The text of a recipe: YAML to values, with the line of each, and no secrets in it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from loratune.run.errors import RecipeError
from loratune.run.secrets import find_secret


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML's own rule reads `1e-4` as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


_SETTING = re.compile(r"\b[a-z]+\.[a-z_]+")
"""The full name of a setting in a message."""

_MOST_NODES = 100_000
"""Values of a recipe, aliases written out: a kilobyte of them can stand for billions."""


def _parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """The nodes, and the value that they stand for."""
    node = yaml.compose(text, Loader=_Loader)
    if node is not None and _count_nodes(node, {}) > _MOST_NODES:
        raise ValueError(f"aliases stand for more than {_MOST_NODES:,} values")
    return node, yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; one that holds itself stands for endlessly many."""
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1  # while it is being counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_count_nodes(part, known) for part in flat)
    return known[id(node)]


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings of a file as nested dictionaries, and the line of each `section.field`.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, sets a name twice, or holds a secret.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError("no such recipe", file=path, fix="check the path; recipes/ holds complete examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe: {error}", file=path, fix="give a UTF-8 YAML file") from None
    refuse_secrets(text, path)
    try:
        node, values = _parse_yaml(text)
    except (ValueError, RecursionError, OverflowError) as error:  # a date such as 2001-99-99, or a thousand brackets
        raise RecipeError(f"not readable YAML: {error}", file=path, fix="mind what is not in quotes") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not valid YAML"
        line = mark.line + 1 if mark is not None else None
        raise RecipeError(f"not YAML: {problem}", file=path, line=line, fix="mind indentation and colons") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise RecipeError(f"a recipe is a mapping of sections, this is a {type(values).__name__}", file=path)
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        _collect_lines(node, "", lines)
    return hoist_task(values, lines), lines


def _collect_lines(node: yaml.MappingNode, prefix: str, lines: dict[str, int]) -> None:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            raise RecipeError(f"{name} is set twice, first on line {lines[name]}", line=key.start_mark.line + 1)
        lines[name] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            _collect_lines(value, f"{name}.", lines)


def hoist_task(values: dict[str, Any], lines: dict[str, int]) -> dict[str, Any]:
    """`task: NAME`, which stands outside of the sections, as the `model.task` that it is.

    Args:
        values: Of a recipe; left as they are.
        lines: The line of each setting; gets that of `model.task`.

    Raises:
        RecipeError: Both are there.
    """
    if "task" not in values:
        return values
    model = values.get("model")
    if isinstance(model, dict) and "task" in model:
        raise RecipeError("task and model.task are one setting", line=lines.get("task"), fix="leave one of them out")
    if model is not None and not isinstance(model, dict):
        return values
    if "task" in lines:
        lines["model.task"] = lines.pop("task")
    rest = {name: value for name, value in values.items() if name not in ("task", "model")}
    return {"model": {**(model or {}), "task": values["task"]}, **rest}


def apply_override(values: dict[str, Any], override: str, lines: dict[str, int]) -> None:
    """Put `section.field=value`, the value in YAML, into what `read_yaml` returned.

    Raises:
        RecipeError: It is not of this shape, or holds a secret.
    """
    refuse_secrets(override, None)
    name, equals, text = override.partition("=")
    name = "model.task" if name.strip() == "task" else name
    section, dot, field = name.strip().partition(".")
    if not equals or not dot:
        raise RecipeError(f"{override!r} is no setting", fix="write section.field=value, such as train.epochs=1")
    try:
        _, value = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError):
        value = text
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise RecipeError(f"section {section} holds {shown(target)}, not settings", line=lines.get(section))
    target[field] = value
    lines.pop(f"{section}.{field}", None)


def refuse_secrets(text: str, path: Path | None) -> None:
    """A recipe is copied into the run, its card and its report: also a comment in it must hold no secret."""
    found = find_secret(text)
    if found is not None:
        place, what = found
        raise RecipeError(
            f"the recipe holds {what}, and recipes are copied into what is shared",
            file=path,
            line=text.count("\n", 0, place) + 1 if path is not None else None,
            fix="remove it; tokens belong in the environment (HF_TOKEN, WANDB_API_KEY) or in `hf auth login`",
        )


def shown(value: Any, most: int = 200) -> str:
    """A value for an error message, at most so many characters long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a thousand levels of lists
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def translate_validation_error(
    error: ValidationError,
    recipe: type[BaseModel],
    source: type[BaseModel],
    file: str | Path | None,
    lines: dict[str, int],
) -> RecipeError:
    """The first complaint of pydantic as ours: the setting, the value, the line, the nearest known name.

    Args:
        error: Of pydantic.
        recipe: The model of sections that was validated.
        source: The model of what lies deeper than a section's field.
        file: Named in the message.
        lines: The line of each `section.field`.
    """
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    name = ".".join(location[:2])
    line = lines.get(".".join(location), lines.get(name))
    if first["type"] == "extra_forbidden":
        known = _known_names(recipe, source, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return RecipeError(f"unknown setting {'.'.join(location)}", file=file, line=line, fix=fix)
    if first["type"] == "value_error":
        raised = first["ctx"]["error"]
        mentioned = [lines[setting] for setting in _SETTING.findall(str(raised)) if setting in lines]
        return RecipeError(
            str(raised), file=file, line=next(iter(mentioned), line), fix=getattr(raised, "fix", "see docs/recipe.md")
        )
    problems = {item["msg"] for item in error.errors() if [str(p) for p in item["loc"]][:2] == location[:2]}
    field, name = _innermost(recipe, source, location)
    words = " ".join((field.description or "").split()) if field is not None else ""
    said = "; or ".join(sorted(problems)).replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
    return RecipeError(
        f"{name} is {shown(first['input'])}: {said}",
        file=file,
        line=line,
        fix=" ".join(filter(None, (_meant(name, first["input"], said), words))),
    )


def _meant(name: str, value: Any, said: str) -> str:
    """What was probably meant by a wrong value, as a sentence."""
    if not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value.lower(), re.findall(r"'([^']+)'", said), n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"{name}: [{value}] is a list of one." if said == "Input should be a list" else ""


def _innermost(recipe: type[BaseModel], source: type[BaseModel], location: list[str]) -> tuple[Any, str]:
    """The field that is wrong, and its full name: that of a source in a list of them, or of a key of a mapping, where it lies deeper
    than a section's field."""
    field, name = _field_of(recipe, location), ".".join(location[:2])
    if field is not None and get_origin(field.annotation) is dict and len(location) == 3:
        return field, f"{name}.{location[2]}"
    if len(location) > 2 and location[-1] in source.model_fields:
        numbers = [part for part in location[2:-1] if part.isdigit()]
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
