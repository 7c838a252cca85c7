"""The pages that prepare a run: choose data, then recipe, plan and tokens, then start."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loratune.cli import plan_tables
from loratune.cli.next_steps import command
from loratune.cli.options import USUAL_BUDGET, as_seconds
from loratune.cli.studio.known_models import models_here
from loratune.cli.studio.pages import as_block, go_to, read_form, show, studio_of
from loratune.cli.studio.places import as_word
from loratune.cli.studio.recipe_text import form_of, set_field
from loratune.recipe.recipe import Recipe
from loratune.recipe.yaml import read_settings
from loratune.reporting.blocks import Charts
from loratune.reporting.plan_section import memory_chart
from loratune.reporting.run_page import token_text
from loratune.run.directory import write_text
from loratune.run.errors import MachineError, RecipeError
from loratune.run.records.base import read_valid_parts
from loratune.run.records.plan import PlanRecord
from loratune.run.records.preview import PreviewRecord

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.requests import Request

    from loratune.cli.studio.pages import Studio

SHOWN_EXAMPLES = 3
"""Examples whose tokens are shown at once."""
COLUMNS = {"prompt": "what the model is asked", "completion": "what it should answer", "system": "system message"}
"""Fields that a column is asked for → what they are."""


async def new_view(request: Request) -> Response:
    """Choose the data, or, with data, say which column is what."""
    studio, data = studio_of(request), request.query_params.get("data", "")
    if not data:
        await studio.helpers.guide.wake()  # while the user looks for a file
        return show("new.html", request, files=studio.places.data_files(), recipes=studio.places.recipes())
    path = studio.places.inside(data)
    name = studio.places.short(path)
    found = await studio.helpers.guide.ask("inspect", data=name)
    models = models_here(studio.places)
    return show("columns.html", request, data=name, found=found, fields=COLUMNS, models=models)


async def upload_view(request: Request) -> Response:
    """Keep a file that was dropped in, in the studio's folder."""
    studio = studio_of(request)
    target = studio.places.for_upload(request.query_params.get("name", ""))
    whole = False
    try:
        with target.open("xb") as stream:
            async for part in request.stream():
                stream.write(part)
        whole = True
    except OSError as error:
        raise MachineError(f"cannot keep the file: {error.strerror}", file=target, fix="try again") from error
    finally:
        if not whole:
            target.unlink(missing_ok=True)
    return JSONResponse({"data": studio.places.short(target)})


async def first_recipe_view(request: Request) -> Response:
    """Write a recipe for the data, as `loratune init` does, and open it."""
    studio, form = studio_of(request), await read_form(request)
    name = studio.places.short(studio.places.inside(form.get("data", "")))
    target = studio.places.unused(f"{Path(name).stem}.yaml")
    columns = {field: form[field] for field in COLUMNS if form.get(field)}
    file = studio.places.short(target)
    await studio.helpers.guide.ask("init", data=name, out=file, columns=columns)
    text = target.read_text(encoding="utf-8")
    if form.get("model", "").strip():
        text = set_field(text, "model.name", json.dumps(form["model"].strip()))
    wanted = f"__models/{target.stem}"
    free = studio.places.short(studio.places.unused(wanted))
    write_text(target, set_field(text, "train.output_dir", json.dumps(free)))
    return go_to("/recipe", file=file)


async def recipe_view(request: Request) -> Response:
    """Show a recipe as form and text."""
    studio = studio_of(request)
    path, text = _open_recipe(studio, request.query_params.get("file", ""))
    main, rest = form_of(text)
    file = studio.places.short(path)
    values: dict[str, Any] = {
        "main": main,
        "rest": rest,
        "models": models_here(studio.places),
        "command": command("train", as_word(file)),
        "sweep": command("sweep", as_word(file)),
        "tune": command("tune", as_word(file)),
        "usual_budget": USUAL_BUDGET,
    }
    return show("recipe.html", request, file=file, text=text, seen=_digest(text), **values)


async def field_view(request: Request) -> Response:
    """Return a recipe's text with another value of one setting; nothing is written."""
    form = await read_form(request)
    text = set_field(form.get("text", "").replace("\r\n", "\n"), form.get("name", ""), form.get("value", ""))
    return JSONResponse({"text": text})


async def save_view(request: Request) -> Response:
    """Write a recipe, unless its file was changed since the page read it; return the form's values."""
    studio, form = studio_of(request), await read_form(request)
    text = await _save(studio, form)
    main, rest = form_of(text)
    fields = {field.name: field.value for part in (main, *rest.values()) for field in part}
    return JSONResponse({"seen": _digest(text), "fields": fields})


async def _save(studio: Studio, form: Any) -> str:
    path, before = _open_recipe(studio, form.get("file", ""))
    text = form.get("text", "").replace("\r\n", "\n")
    if form.get("seen") != _digest(before) and text != before:
        raise RecipeError(
            "the file has changed since this page read it", file=path, fix="copy your text, then reload the page"
        )
    values, lines = read_settings(text, path)
    Recipe.parse(values, file=path, lines=lines)
    write_text(path, text)
    return text


async def plan_view(request: Request) -> Response:
    """Show what `loratune plan` shows."""
    studio = studio_of(request)
    path, _ = _open_recipe(studio, request.query_params.get("file", ""))
    found = await studio.helpers.guide.ask("plan", recipe=studio.places.short(path))
    record = found["plan"]
    blocks = [
        as_block(plan_tables.summary_table(record, model=found["model"]), "Plan"),
        Charts(charts=(memory_chart(read_valid_parts(PlanRecord, found["plan"]).memory, None),)),
        as_block(plan_tables.presets_table(record), "Which matrices get an adapter (lora.targets)", numeric=True),
    ]
    notes = [note.plain for note in plan_tables.notes(record)]
    return show("plan.html", request, blocks=blocks, notes=notes)


async def tokens_view(request: Request) -> Response:
    """Show some examples, token by token."""
    studio = studio_of(request)
    path, _ = _open_recipe(studio, request.query_params.get("file", ""))
    text = request.query_params.get("start", "0")
    start = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0
    name = studio.places.short(path)
    found = await studio.helpers.guide.ask("tokens", recipe=name, start=start, count=SHOWN_EXAMPLES)
    record = read_valid_parts(PreviewRecord, {"examples": found["examples"]})
    blocks = [token_text(example) for example in record.examples]
    first, last = found["start"] + 1, min(found["start"] + SHOWN_EXAMPLES, found["num_examples"])
    return show("tokens.html", request, blocks=blocks, first=first, last=last, total=found["num_examples"])


async def start_view(request: Request) -> Response:
    """Save the recipe, start `loratune train`, and open the page of the run."""
    studio, form = studio_of(request), await read_form(request)
    path, _ = _open_recipe(studio, form.get("file", ""))
    if "text" in form:
        await _save(studio, form)
    file = studio.places.short(path)
    run = studio.run_at(await studio.helpers.guide.ask("where", recipe=file))
    about = studio.places.short(run.root)
    if not any(job.is_running for job in studio.jobs.all(about)) and not run.is_in_use:
        studio.jobs.start(("train", as_word(file)), about=about, source=file)
    return go_to("/run", path=about)


async def start_sweep_view(request: Request) -> Response:
    """Save the recipe, start `loratune sweep`, and open the page of the sweep."""
    form = await read_form(request)
    words = _swept(form.get("settings", ""))
    if form.get("sweep_budget", "").strip():
        words += _budget(form["sweep_budget"])
    return await _start_search(studio_of(request), form, "sweep", words)


async def start_tune_view(request: Request) -> Response:
    """Save the recipe, start `loratune tune`, and open its page."""
    form = await read_form(request)
    return await _start_search(
        studio_of(request), form, "tune", _budget(form.get("tune_budget", "").strip() or USUAL_BUDGET)
    )


async def _start_search(studio: Studio, form: Mapping[str, str], verb: str, words: Sequence[str]) -> Response:
    """Start a verb whose folder is named like the run directory, plus the verb; not if it is at work there already."""
    path, _ = _open_recipe(studio, form.get("file", ""))
    if "text" in form:
        await _save(studio, form)
    file = studio.places.short(path)
    own = Path(await studio.helpers.guide.ask("where", recipe=file))
    place = studio.run_at(str(own.with_name(f"{own.name}-{verb}")))
    about = studio.places.short(place.root)
    if not place.is_in_use and not any(job.is_running for job in studio.jobs.all(about)):
        studio.jobs.start((verb, as_word(file), *words), about=about, source=file)
    return go_to(f"/{verb}", path=about)


def _budget(text: str) -> list[str]:
    """Return the words of a time budget.

    Raises:
        RecipeError: It is not a time.
    """
    as_seconds(text)
    return ["--budget", "".join(text.split())]


def _swept(text: str) -> list[str]:
    """Return the words of what is varied, none of which may be an option.

    Raises:
        RecipeError: It is not a list of `section.field=values`.
    """
    fix = "such as train.learning_rate=1e-4,3e-4 lora.r=8,32"
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"cannot read the settings to vary: {error}", fix=fix) from None
    wrong = next((word for word in words if word.startswith("-") or "=" not in word), None)
    if not words or wrong is not None:
        raise RecipeError("no settings to vary" if not words else f"not a setting to vary: {wrong}", fix=fix)
    return words


def _open_recipe(studio: Studio, name: str) -> tuple[Path, str]:
    """Return a recipe's file and text.

    Raises:
        RecipeError: It is outside of the folder, or not a recipe.
    """
    path = studio.places.inside(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise RecipeError(f"{name} is not a recipe", fix="recipes end in .yaml")
    try:
        return path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe: {error}", file=path, fix="choose another one") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


ROUTES = [
    Route("/new", new_view),
    Route("/upload", upload_view, methods=["PUT"]),
    Route("/init", first_recipe_view, methods=["POST"]),
    Route("/recipe", recipe_view),
    Route("/recipe/field", field_view, methods=["POST"]),
    Route("/recipe/save", save_view, methods=["POST"]),
    Route("/recipe/plan", plan_view),
    Route("/recipe/tokens", tokens_view),
    Route("/start", start_view, methods=["POST"]),
    Route("/tune/start", start_tune_view, methods=["POST"]),
    Route("/sweep/start", start_sweep_view, methods=["POST"]),
]
