"""`explain`: every setting, its effective value, where the value came from, and what it does to this model and data.

Settings with a computed effect are in `effects`; the others are explained by their docstring.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from loratune.planning.prepare import prepare
from loratune.recipe.other_names import named_here
from loratune.recipe.recipe import Recipe, Source, as_recipe
from loratune.recipe.recipe import origins as origins_of
from loratune.run.errors import RecipeError, plural
from loratune.run.html_table import ShownList
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.guidance.effects import SUMMARIES, TABLES
from loratune.workflows.guidance.facts import AlternativeRow, Facts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from loratune.planning.preparation import Preparation
    from loratune.run.directory import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A setting, explained.

    Attributes:
        name: `section.field`.
        value: The value that the run would use.
        origin: `default`, `FILE:LINE` or `command line`.
        written: The value given at the origin, if the run uses another: `auto`, or a default too large for the model.
        reason: Why `written` became `value`.
        default: The default value.
        words: The field's docstring.
        effect: What the value does here, in numbers; empty for settings without a computed effect.
        alternatives: What other values would do, one row each; only if the field was asked for by name.
    """

    name: str
    value: str
    origin: str
    written: str
    reason: str
    default: str
    words: str
    effect: str
    alternatives: tuple[AlternativeRow, ...] = ()

    @property
    def origin_in_words(self) -> str:
        """The origin, with the written value and the reason if the run uses another value: `default: auto (why)`."""
        if not self.written:
            return self.origin
        return f"{self.origin}: {self.written}" + (f" ({self.reason})" if self.reason else "")

    def as_dict(self) -> Record:
        """Return the record that `--json` prints."""
        return asdict(self)


def explain(
    recipe: Recipe | str | Path,
    prepared: Preparation | None = None,
    origins: Mapping[str, str] | None = None,
    fields: Sequence[str] = (),
    *,
    progress: Progress = NO_PROGRESS,
) -> list[Explanation]:
    """Explain the settings of a run.

    Args:
        recipe: The recipe as written, or its file.
        prepared: The prepared run; None to prepare it.
        origins: The origin of each setting, from `recipe.origins`; None to find it in the recipe's file.
        fields: Settings to explain with alternatives, as `lora.r` or `r`. If empty, all settings without alternatives.
        progress: Shows how far preparation is.

    Raises:
        RecipeError: A setting does not exist.
    """
    names = [full_name(field) for field in fields] or all_fields()
    if origins is None:
        origins = {} if isinstance(recipe, Recipe) else origins_of(recipe)
    recipe = as_recipe(recipe)
    facts = Facts(prepared or prepare(recipe, progress, weights=False))
    return ShownList(
        (_explain(name, recipe, facts, origins, with_alternatives=bool(fields)) for name in names),
        title=f"{recipe.model.name}: {plural(len(names), 'setting')}",
        columns={
            "setting": lambda item: item.name,
            "value": lambda item: item.value,
            "from": lambda item: item.origin_in_words,
            "what it does": lambda item: item.effect or item.words,
        },
    )


def all_fields() -> list[str]:
    """Return every `section.field`, in the order of the recipe."""
    return [f"{section}.{field}" for section in Recipe.model_fields for field in _fields(section)]


def full_name(field: str) -> str:
    """Return the full name of a field: `lora.r` for `lora.r` or `r`.

    Raises:
        RecipeError: No field has this name, or several have.
    """
    known = all_fields()
    found = [name for name in known if field in (name, name.partition(".")[2])]
    if len(found) == 1:
        return found[0]
    bare = [name.partition(".")[2] for name in known]
    near = found or difflib.get_close_matches(field, [*known, *bare], n=2)
    fix = f"did you mean {' or '.join(near)}?" if near else "`loratune explain RECIPE` lists all settings"
    fix = fix if found else named_here(field) or fix
    problem = f"several settings are named {field}" if found else f"unknown setting {field}"
    raise RecipeError(problem, fix=fix)


def _explain(
    name: str, recipe: Recipe, facts: Facts, origins: Mapping[str, str], *, with_alternatives: bool
) -> Explanation:
    section, _, field = name.partition(".")
    declared = _fields(section)[field]
    written = getattr(getattr(recipe, section), field)
    value, reason = _effective(name, facts.prepared)
    same = value == written
    summary, table = SUMMARIES.get(name), TABLES.get(name)
    return Explanation(
        name=name,
        value=shown_value(value),
        origin=origins.get(name, "default"),
        written="" if same else shown_value(written),
        reason="" if same else reason,
        default=shown_value(declared.get_default(call_default_factory=True)),
        words=" ".join((declared.description or "").split()),
        effect=summary(facts) if summary is not None else "",
        alternatives=tuple(table(facts)) if table is not None and with_alternatives else (),
    )


def _fields(section: str) -> dict[str, Any]:
    annotation: Any = Recipe.model_fields[section].annotation
    fields: dict[str, Any] = annotation.model_fields
    return fields


def _effective(name: str, prepared: Preparation) -> tuple[Any, str]:
    """Return the value that the run uses, and why if the user did not choose it."""
    section, _, field = name.partition(".")
    value = getattr(getattr(prepared.recipe, section), field)
    report = prepared.data.report
    if name == "data.format" and value == "auto":
        return report["train"]["format"], f"the format of all {report['train']['rows']:,} rows"
    if name == "data.eval" and value == "auto":
        source = report["eval"]["sources"][0]
        if "held_out" in source:
            return source["held_out"], "this share of the training conversations is held out"
        split = Source.model_validate({key: source[key] for key in Source.model_fields})
        return (split,), "the dataset has this split"
    if name == "train.output_dir":
        return value, "named after the model"
    choice = prepared.choices.get(name)
    return value, choice.reason if choice is not None else ""


def shown_value(value: Any) -> str:
    """Format a value as a recipe would write it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Source):
        place = ":".join(part for part in (value.name, value.config, value.split) if part)
        return place if value.weight == 1 else f"{place} × {value.weight:g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown_value(item)}" for name, item in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(shown_value(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def explanation_table(explanations: Sequence[Explanation]) -> Table:
    """Return a table of all settings, with the origin below each value that is not a plain default."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("setting: value, and origin unless default", overflow="fold", ratio=2)
    table.add_column("effect here, or meaning", overflow="fold", ratio=3)
    section = ""
    for item in explanations:
        before, section = section, item.name.partition(".")[0]
        if before and before != section:
            table.add_section()
        origin = re.sub(r"^.*:(\d+)", r"line \1", item.origin_in_words)  # the file is the one on the command line
        below = "" if origin == "default" else f"\n  [dim]{escape(origin)}[/dim]"
        table.add_row(
            f"{item.name}: [bold]{escape(item.value)}[/bold]{below}", escape(item.effect or _first_sentence(item.words))
        )
    return table


def explanation_page(item: Explanation) -> Group:
    """Return one setting in full: docstring, value, origin, effect and alternatives."""
    head = Table(show_header=False, box=None, padding=(0, 1))
    rows = {"value": item.value, "origin": item.origin_in_words, "default": item.default, "effect": item.effect}
    for name, text in rows.items():
        if text:
            head.add_row(f"[bold]{name}[/bold]", escape(text))
    parts: list[Any] = [f"[bold]{item.name}[/bold]", f"\n{escape(item.words)}\n", head]
    if item.alternatives:
        parts += ["", _alternatives(item.alternatives)]
    return Group(*parts, "")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z)`])\. (?=[A-Z`])", text, maxsplit=1)[0].rstrip(".")


def _alternatives(rows: Sequence[AlternativeRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(text) for text in row.values()))
    return table
