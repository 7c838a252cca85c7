"""A file of another tool → the settings of a recipe, and what has no counterpart.

Reads YAML of Axolotl, LLaMA-Factory and mlx-lm, and arguments of TRL, PEFT and transformers as YAML or JSON. Every
setting of the file is accounted for: it is the origin of a setting of the recipe, or it is left out with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.data.rows.json_text import parse_json
from loratune.recipe.recipe import Recipe
from loratune.recipe.validation_errors import shown
from loratune.recipe.yaml import read_yaml, refuse_secrets
from loratune.run.errors import RecipeError
from loratune.workflows.guidance.other_tools.data import DATA_WORDS, data_parts
from loratune.workflows.guidance.other_tools.preferences import TASK_WORDS, is_preference, task_parts
from loratune.workflows.guidance.other_tools.rules import AS_A_WHOLE, answers_to, is_a_word
from loratune.workflows.guidance.other_tools.settings import OtherSettings, Translated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DECISIVE = ("data.train_on", "model.task", "preference.loss")
"""Settings of which a file must not say two things: they decide what is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A setting that was not taken over.

    Attributes:
        name: Its name in the file; of a nested one, with the names above it.
        value: Its value, as text.
        reason: Why, or what to do instead.
    """

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value} ({self.reason})"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFile:
    """What a file of another tool says.

    Attributes:
        tool: The tool.
        settings: `section.field` → value.
        origins: `section.field` → the settings of the file that it comes from, with their values.
        left_out: What was not taken over.
    """

    tool: str
    settings: dict[str, Any]
    origins: dict[str, list[str]]
    left_out: tuple[LeftOut, ...]


def read_other_file(path: Path) -> OtherFile:
    """Translate the settings of another tool's file.

    Args:
        path: YAML, or JSON if its name ends in `.json`.

    Raises:
        RecipeError: The file cannot be read, is a recipe already, trains something that loratune does not, has a list
            or a mapping where a word belongs, or says two things of what is learned.
    """
    values, lines = _read(path)
    if (
        values
        and set(values) <= {"task", *Recipe.model_fields}
        and all(isinstance(part, dict) for name, part in values.items() if name != "task")
    ):
        raise RecipeError("this is already a recipe of loratune", file=path, fix=f"loratune plan {path}")
    everything = dict(_flat(values, ""))
    named = {name: value for name, value in everything.items() if value is not None}
    file = OtherSettings(path=path, named=named, lines=lines)
    for name, value in named.items():
        if isinstance(value, list | dict) and _is_a_word(name):
            raise file.error(
                name,
                f"{name} is {shown(value, 60)}, where one word or number belongs",
                f"write {name} as one value, or remove it from the file",
            )
    return _add_up(file, [name for name, value in everything.items() if value is None])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings of a file, and the line of each as far as it is known."""
    if path.suffix.lower() != ".json":
        return read_yaml(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_json(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"cannot read the settings: {error}", file=path, fix="provide a JSON object") from None
    refuse_secrets(text, path)
    if not isinstance(values, dict):
        raise RecipeError("not a JSON object of settings", file=path, fix='write {"learning_rate": 2e-4, …}')
    try:
        return values, read_yaml(path)[1]  # JSON is YAML, except where it is indented with tabs
    except RecipeError:
        return values, {}


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every setting, those of nested mappings, and of datasets, with the names above them."""
    whole = name.rpartition(".")[2] in AS_A_WHOLE or _is_a_word(name)
    if isinstance(value, dict) and (value or not name) and not whole:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif name == "datasets" and isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}.{number}")
    else:
        yield name, value


def _is_a_word(name: str) -> bool:
    return is_a_word(name) or name.rpartition(".")[2] in (*TASK_WORDS, *DATA_WORDS)


def _parts(file: OtherSettings) -> Iterator[Translated]:
    """Yield what becomes of each setting, first the task and the data, which others must fit."""
    parts = task_parts(file)
    parts += data_parts(file, pairs=is_preference(parts))
    yield from parts
    done = {part.name for part in parts}
    for name, value in file.named.items():
        for answer in answers_to(name, value, file) if name not in done else ():
            yield Translated(name=name, value=value, answer=answer)


def _add_up(file: OtherSettings, empty: list[str]) -> OtherFile:
    """Put the parts together to a recipe."""
    settings: dict[str, Any] = {}
    origins: dict[str, list[str]] = {}
    waiting: list[Translated] = []
    left_out = [LeftOut(name=name, value="null", reason="it has no value") for name in empty]
    for part in _parts(file):
        if isinstance(part.answer, str):
            left_out.append(_left_out(part, part.answer))
        elif _add(settings, origins, part, file):  # refused, perhaps only until another setting is there too
            waiting.append(part)
    refused = [(part, _add(settings, origins, part, file)) for part in waiting]
    left_out += [_left_out(part, reason) for part, reason in refused if reason]
    return OtherFile(tool=file.tool, settings=settings, origins=origins, left_out=tuple(left_out))


def _left_out(part: Translated, reason: str) -> LeftOut:
    name, _, value = str(part).partition(": ")
    return LeftOut(name=name, value=value, reason=reason)


def _add(settings: dict[str, Any], origins: dict[str, list[str]], part: Translated, file: OtherSettings) -> str:
    """Add what a setting becomes if it makes a recipe with the others; else return why not.

    Raises:
        RecipeError: The file says two things of what is learned.
    """
    assert isinstance(part.answer, dict)
    merged = {**settings, **part.answer}
    if "data.columns" in settings and "data.columns" in part.answer:
        merged["data.columns"] = {**settings["data.columns"], **part.answer["data.columns"]}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in merged.items():
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = value
    try:
        Recipe.parse(nested, file="the recipe")
    except RecipeError as error:
        return f"{error.problem}; {error.fix}"
    for name in part.answer:
        if name in settings and _differ(settings[name], merged[name], part.answer[name]):
            before = ", ".join(origins[name])
            if name in _DECISIVE:
                raise file.error(
                    part.name,
                    f"{part} makes {name} {part.answer[name]}, but {before} makes it {settings[name]}",
                    "remove one of them from the file",
                )
            return f"{name} is {shown(settings[name], 60)} already, by {before}"
    settings.update(merged)
    for name in part.answer:
        origins.setdefault(name, [])
        if str(part) not in origins[name]:
            origins[name].append(str(part))
    return ""


def _differ(before: Any, merged: Any, now: Any) -> bool:
    """Whether a setting has another value already; columns differ only if the same field has another one."""
    if isinstance(before, dict):
        return any(before.get(field, column) != column for field, column in now.items())
    return bool(before != merged)
