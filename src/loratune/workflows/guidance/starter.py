"""A recipe to start from, as commented YAML."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from loratune.recipe.recipe import Recipe
from loratune.recipe.schema import EDITOR_LINE

if TYPE_CHECKING:
    from loratune.workflows.guidance.other_tools.read import LeftOut

WIDTH = 118

Value = tuple[Any, str]
Settings = dict[str, Value]
"""`section.field` → value and reason; no reason if a shipped recipe sets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StarterRecipe:
    """A recipe to start from.

    Attributes:
        title: First line of the file.
        settings: Settings that the recipe sets.
        left_out: What was not taken over from another tool's file.
        head: The comments at the top of a shipped recipe, which then stand in place of the title.
    """

    title: str
    settings: Settings
    left_out: tuple[LeftOut, ...] = ()
    head: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for `--json`."""
        return {name: {"value": value, "reason": reason} for name, (value, reason) in self.settings.items()}

    def left_out_by_reason(self) -> list[str]:
        """Return what was not taken over as one line for each reason."""
        reasons: dict[str, list[str]] = {}
        for item in self.left_out:
            reasons.setdefault(item.reason, []).append(f"{item.name}: {item.value}")
        return [f"{', '.join(settings)} ({reason})" for reason, settings in reasons.items()]

    def to_yaml(self) -> str:
        """Return the recipe as YAML, each setting below its field's docstring."""
        Recipe.parse(_nested(self.settings))  # never write a recipe that cannot be read
        lines = [
            EDITOR_LINE,
            *(self.head or _comment(self.title)),
            *_comment("`loratune explain` shows what each setting does to your model."),
            *(line for item in self.left_out_by_reason() for line in _comment(f"Not taken over: {item}")),
        ]
        for section, info in Recipe.model_fields.items():
            part: Any = info.annotation
            fields = [field for field in part.model_fields if f"{section}.{field}" in self.settings]
            if not fields:
                continue
            lines += ["", *_comment((part.__doc__ or "").strip().partition("\n")[0]), f"{section}:"]
            for number, field in enumerate(fields):
                value, reason = self.settings[f"{section}.{field}"]
                words = " ".join((part.model_fields[field].description or "").split())
                lines += ["", *_comment(words, indent=2)] if number else _comment(words, indent=2)
                if reason:
                    lines += _comment(f"Here: {reason}.", indent=2)
                lines += _yaml_lines(field, value)
        return "\n".join(lines) + "\n"


def _nested(settings: Settings) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for name, (value, _) in settings.items():
        section, _, field = name.partition(".")
        values.setdefault(section, {})[field] = value
    return values


def _comment(text: str, indent: int = 0) -> list[str]:
    start = " " * indent + "# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False)


def _yaml_lines(field: str, value: Any) -> list[str]:
    text = yaml.safe_dump({field: value}, sort_keys=False, allow_unicode=True, width=WIDTH)
    return textwrap.indent(text.rstrip("\n"), "  ").split("\n")
