"""The helper process that prepares a run: reads rows, writes a first recipe, plans, and shows the tokens of any
example."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loratune.cli.output import with_recipe
from loratune.cli.studio.lines import serve_stdin
from loratune.data.preview import preview
from loratune.data.rows.formats import detect_format
from loratune.data.rows.sources import read_rows
from loratune.planning.auto import output_dir
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Column, Recipe, Source
from loratune.run.errors import DataError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.guidance.guesses import guess_columns
from loratune.workflows.guidance.init import init

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratune.planning.preparation import Preparation

SHOWN_ROWS = 3
_LONGEST = 300
"""Characters of a cell that are shown."""


def inspect_rows(request: dict[str, Any], _: Callable[[Any], None]) -> dict[str, Any]:
    """Return what is known of a data file: its format, its columns and what they seem to be, and its first rows."""
    rows = read_rows(Source(name=request["data"]))
    try:
        form, problem = detect_format(rows, strict=False), ""
    except DataError as error:
        form, problem = "", error.problem
    first = rows[0].value if rows else None
    columns = [str(name) for name in first] if isinstance(first, dict) else []
    shown = [row.value for row in islice(rows, SHOWN_ROWS)]
    return {
        "num_rows": len(rows),
        "format": form,
        "problem": problem,
        "columns": columns,
        "fields": list(get_args(Column)),
        "guess": guess_columns(rows) if rows and not form else {},
        "rows": [[_short(row.get(name)) if isinstance(row, dict) else "" for name in columns] for row in shown]
        if columns
        else [[_short(row)] for row in shown],
    }


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def write_recipe(request: dict[str, Any], _: Callable[[Any], None]) -> dict[str, Any]:
    """Do what `loratune init DATA --out FILE` does."""
    path, starter = init(request["data"], request["out"], columns=request["columns"] or None)
    return {"recipe": str(path), "title": starter.title}


def find_output(request: dict[str, Any], _: Callable[[Any], None]) -> str:
    """Return the run directory of a recipe."""
    return str(output_dir(Recipe.load(request["recipe"])))


@dataclass(slots=True)
class Planned:
    """The recipe that was planned last, with its data, so that its examples need not be prepared for every page."""

    text: str = ""
    prepared: Preparation | None = None

    def prepare(self, file: str) -> Preparation:
        """Return the prepared run of a recipe: the last one, if nothing in the file has changed."""
        text = f"{file}\n{Path(file).read_text(encoding='utf-8')}"
        if self.prepared is None or text != self.text:
            self.prepared = prepare(Recipe.load(file), NO_PROGRESS, weights=False)
            self.text = text
        return self.prepared

    def plan(self, request: dict[str, Any], _: Callable[[Any], None]) -> dict[str, Any]:
        """Return what `loratune plan` shows."""
        self.prepared = None  # data and free memory may have changed
        prepared = self.prepare(request["recipe"])
        record = with_recipe(prepared.as_plan(), prepared.recipe)
        model = f"{prepared.recipe.model.name} → {prepared.model.base.path}"
        return {"plan": record, "report": prepared.data.report, "model": model, "num_examples": _count(prepared)}

    def tokens(self, request: dict[str, Any], _: Callable[[Any], None]) -> dict[str, Any]:
        """Return some training examples, token by token."""
        prepared = self.prepare(request["recipe"])
        number = _count(prepared)
        start = min(max(0, request["start"]), max(0, number - 1))
        chosen = prepared.data.train[start : start + request["count"]]
        shown = preview(chosen, prepared.model.tokenizer, request["count"])
        return {"start": start, "num_examples": number, "examples": shown.as_record()["examples"]}


def _count(prepared: Preparation) -> int:
    return len(prepared.data.train)


if __name__ == "__main__":
    planned = Planned()
    serve_stdin(
        {
            "inspect": inspect_rows,
            "init": write_recipe,
            "where": find_output,
            "plan": planned.plan,
            "tokens": planned.tokens,
        }
    )
