"""The text of a recipe: YAML to values, with the line of each setting, and no secrets in it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from loratune.recipe.other_names import named_here
from loratune.recipe.validation_errors import ON_COMMAND_LINE, shown
from loratune.run.errors import RecipeError, find_secret


class _Loader(yaml.SafeLoader):
    """A safe loader that reads numbers by YAML 1.2: PyYAML's own rule reads `1e-4` as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx")
"""Suffixes of data, which no recipe has."""

_MAX_NODES = 100_000
"""Values of a recipe with its aliases expanded: a kilobyte of nested aliases can stand for billions of values."""


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the root node and its value, whatever they are.

    Raises:
        YAMLError, ValueError, RecursionError, OverflowError: It is not YAML, or too large.
    """
    node = yaml.compose(text, Loader=_Loader)
    if node is not None and _count_nodes(node, {}) > _MAX_NODES:
        raise ValueError(f"aliases expand to more than {_MAX_NODES:,} values")
    return node, yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node with its aliases expanded."""
    if id(node) not in known:
        known[id(node)] = _MAX_NODES + 1  # while it is being counted: a node that contains itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_count_nodes(part, known) for part in flat)
    return known[id(node)]


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings of a file as nested dictionaries, and the line of each `section.field`.

    Raises:
        RecipeError: The file cannot be read, is not a YAML mapping, sets a name twice, or contains a secret.
    """
    if path.suffix.lower() in _TABLES:
        fix = f"{shlex.join(['loratune', 'init', str(path)])}  # writes a recipe for it"
        raise RecipeError("this is data, not a recipe", file=path, fix=fix)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError("no such recipe", file=path, fix="check the path; `loratune init` writes a recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe: {error}", file=path, fix="provide a UTF-8 YAML file") from None
    return read_settings(text, path)


def read_settings(text: str, path: Path | None) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings in a recipe's text as nested dictionaries, and the line of each `section.field`.

    Args:
        text: The YAML.
        path: Its file, for error messages.

    Raises:
        RecipeError: It is not a YAML mapping, sets a name twice, or contains a secret.
    """
    refuse_secrets(text, path)
    try:
        node, values = parse_yaml(text)
    except (ValueError, RecursionError, OverflowError) as error:  # a date such as 2001-99-99, or a thousand brackets
        raise RecipeError(f"unreadable YAML: {error}", file=path, fix="check the quoting") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not valid YAML"
        line = mark.line + 1 if mark is not None else None
        fix = "indent with spaces instead of tabs" if "'\\t'" in problem else "check indentation and colons"
        raise RecipeError(f"not YAML: {problem}", file=path, line=line, fix=fix) from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise RecipeError(
            f"a recipe is a mapping of sections, but this is a {type(values).__name__}",
            file=path,
            fix="`loratune init` writes one to start from",
        )
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
    """Move a top-level `task: NAME` to `model.task`.

    Args:
        values: The settings of a recipe; not changed.
        lines: The line of each setting; gets the line of `model.task`.

    Raises:
        RecipeError: Both are set.
    """
    if "task" not in values:
        return values
    model = values.get("model")
    if isinstance(model, dict) and "task" in model:
        raise RecipeError("task and model.task are the same setting", line=lines.get("task"), fix="remove one of them")
    if model is not None and not isinstance(model, dict):
        return values
    if "task" in lines:
        lines["model.task"] = lines.pop("task")
    rest = {name: value for name, value in values.items() if name not in ("task", "model")}
    return {"model": {**(model or {}), "task": values["task"]}, **rest}


def apply_override(values: dict[str, Any], override: str, lines: dict[str, int]) -> None:
    """Apply `section.field=value`, with the value in YAML, to what `read_yaml` returned.

    Raises:
        RecipeError: The override has another form, or contains a secret.
    """
    refuse_secrets(override, None)
    name, equals, text = override.partition("=")
    name = "model.task" if name.strip() == "task" else name
    section, dot, field = name.strip().partition(".")
    if not equals or not dot:
        fix = named_here(section) or "write section.field=value, such as train.epochs=1"
        raise RecipeError(f"{override!r} is not a setting", fix=fix)
    try:
        _, value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError):
        value = text
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise RecipeError(f"section {section} is {shown(target)}, not a mapping of settings", line=lines.get(section))
    target[field] = value
    lines[f"{section}.{field}"] = ON_COMMAND_LINE


def refuse_secrets(text: str, path: Path | None) -> None:
    """Raise if a recipe contains a secret, even in a comment: it is copied into the run, its model card and report."""
    found = find_secret(text)
    if found is not None:
        place, what = found
        raise RecipeError(
            f"the recipe contains {what}, and recipes are copied into files that are shared",
            file=path,
            line=text.count("\n", 0, place) + 1 if path is not None else None,
            fix="remove it; tokens belong in the environment (HF_TOKEN, WANDB_API_KEY) or in `hf auth login`",
        )
