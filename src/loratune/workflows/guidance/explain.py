"""`explain`: every effective setting, where its value comes from, and what it does to this model and this data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from loratune.planning.preparation import Preparation
from loratune.recipe.recipe import Recipe, Source
from loratune.run.directory import Record
from loratune.run.errors import RecipeError
from loratune.workflows.guidance.effects import SUMMARIES, TABLES
from loratune.workflows.guidance.facts import AlternativeRow, Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One setting.

    Attributes:
        name: `section.field`.
        value: What the run would use.
        origin: `default`, `FILE:LINE` or `command line`.
        written: What was given there, where the run uses another: `auto`, or a default that the model cannot hold.
        reason: Why it became `value`.
        default: The default.
        words: What the field is, from its docstring.
        effect: What the value does here, in numbers; empty where there is nothing to count.
        alternatives: What other values would do, a row each; only on a field's own page.
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
        """`default`, or `default: auto (why)`."""
        if not self.written:
            return self.origin
        return f"{self.origin}: {self.written}" + (f" ({self.reason})" if self.reason else "")

    def as_dict(self) -> Record:
        """For `--json`."""
        return asdict(self)


def explain(
    recipe: Recipe, prepared: Preparation, origins: Mapping[str, str], fields: Sequence[str] = ()
) -> list[Explanation]:
    """Explain the settings of a run.

    Args:
        recipe: As it was written.
        prepared: What became of it.
        origins: From `recipe.origins`.
        fields: The settings to explain, with alternatives; `lora.r`, or `r` alone. Without any, all, without
            alternatives.

    Raises:
        RecipeError: There is no such field.
    """
    facts = Facts(prepared)
    names = [full_name(field) for field in fields] or all_fields()
    return [_explain(name, recipe, facts, origins, with_alternatives=bool(fields)) for name in names]


def all_fields() -> list[str]:
    """Every `section.field`, in the order of the recipe."""
    return [f"{section}.{field}" for section in Recipe.model_fields for field in _fields(section)]


def full_name(field: str) -> str:
    """`lora.r` for `lora.r` or `r`.

    Raises:
        RecipeError: No field, or more than one, has this name.
    """
    known = all_fields()
    found = [name for name in known if field in (name, name.partition(".")[2])]
    if len(found) == 1:
        return found[0]
    bare = [name.partition(".")[2] for name in known]
    near = found or difflib.get_close_matches(field, [*known, *bare], n=2)
    fix = f"did you mean {' or '.join(near)}?" if near else "`loratune explain RECIPE` shows all"
    raise RecipeError(f"{field} is no setting", fix=fix)


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
        value=shown(value),
        origin=origins.get(name, "default"),
        written="" if same else shown(written),
        reason="" if same else reason,
        default=shown(declared.get_default(call_default_factory=True)),
        words=" ".join((declared.description or "").split()),
        effect=summary(facts) if summary is not None else "",
        alternatives=tuple(table(facts)) if table is not None and with_alternatives else (),
    )


def _fields(section: str) -> dict[str, Any]:
    annotation: Any = Recipe.model_fields[section].annotation
    fields: dict[str, Any] = annotation.model_fields
    return fields


def _effective(name: str, prepared: Preparation) -> tuple[Any, str]:
    """What the run uses, and why, where it was not the user's choice."""
    section, _, field = name.partition(".")
    value = getattr(getattr(prepared.recipe, section), field)
    report = prepared.data.report
    if name == "data.format" and value == "auto":
        return report["train"]["format"], f"what all {report['train']['rows']:,} rows are"
    if name == "data.eval" and value == "auto":
        source = report["eval"]["sources"][0]
        if "held_out" in source:
            return source["held_out"], "that part of the training conversations is held out"
        return (
            Source.model_validate({key: source[key] for key in Source.model_fields}),
        ), "the data set has that split"
    if name == "train.output_dir":
        return value, "named after the model"
    choice = prepared.choices.get(name)
    return value, choice.reason if choice is not None else ""


def shown(value: Any) -> str:
    """A setting as the recipe would write it, in short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Source):
        place = ":".join(part for part in (value.name, value.config, value.split) if part)
        return place if value.weight == 1 else f"{place} × {value.weight:g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(item)}" for name, item in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(shown(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def explanation_table(explanations: Sequence[Explanation]) -> Table:
    """All settings, a row each; where one comes from stands below it, unless it is a default as it is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("setting and value, with its place where it is no default", overflow="fold", ratio=2)
    table.add_column("what it does here", overflow="fold", ratio=3)
    section = ""
    for item in explanations:
        before, section = section, item.name.partition(".")[0]
        if before and before != section:
            table.add_section()
        origin = re.sub(r"^.*:(\d+)", r"line \1", item.origin_in_words)  # the file is the one that was asked about
        below = "" if origin == "default" else f"\n  [dim]{escape(origin)}[/dim]"
        table.add_row(f"{item.name}: [bold]{escape(item.value)}[/bold]{below}", escape(item.effect))
    return table


def explanation_page(item: Explanation) -> Group:
    """One setting, on a page."""
    head = Table(show_header=False, box=None, padding=(0, 1))
    rows = {"value": item.value, "from": item.origin_in_words, "default": item.default, "here": item.effect}
    for name, text in rows.items():
        if text:
            head.add_row(f"[bold]{name}[/bold]", escape(text))
    parts: list[Any] = [f"[bold]{item.name}[/bold]", f"\n{escape(item.words)}\n", head]
    if item.alternatives:
        parts += ["", _alternatives(item.alternatives)]
    return Group(*parts, "")


def _alternatives(rows: Sequence[AlternativeRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(text) for text in row.values()))
    return table
