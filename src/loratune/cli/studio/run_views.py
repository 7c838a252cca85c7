"""The pages of runs: the list, one run while it trains and after, chat, exports, comparison."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from markupsafe import Markup
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from loratune.cli.next_steps import command
from loratune.cli.studio.exports import EXPORTS, exports_of, words_of
from loratune.cli.studio.pages import as_block, events, fragment, go_to, read_form, show, studio_of, whole_page
from loratune.cli.studio.places import as_word
from loratune.cli.studio.tunes import find_searches
from loratune.recipe.tasks import load_task
from loratune.reporting.blocks import Paragraph
from loratune.reporting.comparison_page import comparison_page
from loratune.reporting.curves_section import curves
from loratune.reporting.html import render_page
from loratune.reporting.run_diff import diff, difference_table
from loratune.reporting.run_files import read_run
from loratune.reporting.run_list import list_these, ranked_table
from loratune.reporting.run_page import run_page
from loratune.reporting.samples_section import answers_during_training
from loratune.reporting.watch import headline, watch_rows
from loratune.run.errors import LoratuneError, RecipeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.requests import Request

    from loratune.cli.studio.pages import Studio
    from loratune.reporting.run_files import RunFiles
    from loratune.run.directory import RunDir

_SHOWN = ("missing", "verdict", "result", "samples", "progress", "events")
"""Sections of the report that the page of a finished run shows."""
MOST_TURNS = 200


async def home_view(request: Request) -> Response:
    """List the runs, and what is being done."""
    studio = studio_of(request)
    found = await anyio.to_thread.run_sync(lambda: list_these(studio.places.runs(), title="Runs"))
    rows = [(studio.places.short(studio.places.inside(run.run)), run) for run in found]
    known = {name for name, _ in rows}
    starting = [job for job in studio.jobs.all() if job.is_running and job.about not in known]
    places = studio.places
    searches = await anyio.to_thread.run_sync(lambda: list(find_searches(places.sweeps(), places.root)))
    named = {places.short(search.folder): search for search in searches}
    starting = [job for job in starting if job.about not in named]
    return show("home.html", request, rows=rows, starting=starting, searches=named)


async def run_view(request: Request) -> Response:
    """Show one run, whatever its state."""
    studio = studio_of(request)
    place = studio.run_at(request.query_params.get("path", ""))
    name = studio.places.short(place.root)
    jobs = studio.jobs.all(name)
    files = await _files(place)
    state = _state(files, jobs)
    values: dict[str, Any] = {"name": name, "state": state, "jobs": jobs, "job": jobs[0] if jobs else None}
    values |= {"resume": command("resume", as_word(name)), "log": _log(studio, place, jobs)}
    if files is None:
        if not jobs:
            raise RecipeError(f"{name} is not a run directory", fix="go back to the runs")
        return show("run.html", request, files=None, page=None, blocks=[], exports=[], chats=False, **values)
    page = run_page(files)
    blocks = [(section.title, section.blocks) for section in page.sections if section.name in _SHOWN]
    chats = files.is_trained and _writes_text(files)
    exports = []
    if chats and state == "finished":
        exports = await anyio.to_thread.run_sync(exports_of, studio.places, name, files, jobs)
    values |= {"live": _live(files)} if state != "finished" else {}
    return show("run.html", request, files=files, page=page, blocks=blocks, exports=exports, chats=chats, **values)


async def _files(place: RunDir) -> RunFiles | None:
    return await anyio.to_thread.run_sync(read_run, place) if place.lock.is_file() else None


def _state(files: RunFiles | None, jobs: list[Any]) -> str:
    """Return `starting`, `failed`, or the state of the run."""
    working = any(job.is_running and job.words[0] in ("train", "resume") for job in jobs)
    if files is None:
        return "starting" if working else "failed"
    return "starting" if working and files.state == "stopped" else files.state


def _writes_text(files: RunFiles) -> bool:
    try:
        assert files.lock is not None
        return load_task(files.lock.recipe["model"]["task"]).writes_text
    except (KeyError, AttributeError, AssertionError):  # a damaged lock; the page says so
        return False


def _log(studio: Studio, place: RunDir, jobs: list[Any]) -> str:
    """Return the end of what the last command on the run printed, or of the run's own log."""
    if jobs:
        return studio.jobs.output(jobs[0])
    try:
        return place.log.read_text(encoding="utf-8", errors="replace")[-20_000:]
    except OSError:
        return ""


def _live(files: RunFiles) -> Markup:
    """Return what changes while a run goes on, as a part of a page."""
    rows = list(watch_rows(files, 80)) if files.steps else []
    rows[:2] = [("loss", text) for _, text in rows[1:2]]  # the first is the curve, in characters
    samples = list(answers_during_training(files, newest_only=True)) if files.evaluation is None else []
    if samples:
        asked = {"prompt", f"step {files.samples[-1].step}"}
        rows = [(name, text) for name, text in rows if name not in asked]  # they are shown below, as blocks
    return fragment("live.html", headline=headline(files), rows=rows, blocks=list(curves(files)), samples=samples)


async def events_view(request: Request) -> Response:
    """Send what is new about a run as server-sent events, until its state changes."""
    studio = studio_of(request)
    place = studio.run_at(request.query_params.get("path", ""))
    name = studio.places.short(place.root)

    async def read() -> dict[str, str]:
        jobs = studio.jobs.all(name)
        files = await _files(place)
        live = "" if files is None else _live(files)
        return {"state": _state(files, jobs), "live": live, "log": _log(studio, place, jobs)}

    return events(request, read)


async def stop_view(request: Request) -> Response:
    """Do what Ctrl-C does."""
    studio, form = studio_of(request), await read_form(request)
    place = studio.run_at(form.get("path", ""))
    studio.jobs.stop(place)
    return go_to("/run", path=studio.places.short(place.root))


async def resume_view(request: Request) -> Response:
    """Start `loratune resume`."""
    studio, form = studio_of(request), await read_form(request)
    name = studio.places.short(studio.open_run(form.get("path", "")).root)
    studio.jobs.start(("resume", as_word(name)), about=name)
    return go_to("/run", path=name)


async def export_view(request: Request) -> Response:
    """Start an export, which also writes its certificate."""
    studio, form = studio_of(request), await read_form(request)
    name, kind = studio.places.short(studio.open_run(form.get("path", "")).root), form.get("to", "")
    if kind not in EXPORTS:
        raise RecipeError(f"{kind!r} is not an export", fix=f"one of {', '.join(EXPORTS)}")
    job = studio.jobs.start(words_of(kind, name), about=name, key=f"{name}: {kind}")
    return go_to("/job", id=job.id)


async def job_view(request: Request) -> Response:
    """Show a command: what it is, what it printed, how it ended."""
    studio = studio_of(request)
    found = studio.jobs.get(request.query_params.get("id", ""))
    return show("job.html", request, job=found, output=studio.jobs.output(found))


async def report_view(request: Request) -> Response:
    """Show the report of a run, with the policy of the report."""
    place = studio_of(request).open_run(request.query_params.get("path", ""))
    text = await anyio.to_thread.run_sync(lambda: render_page(run_page(read_run(place))))
    return whole_page(text)


async def compare_view(request: Request) -> Response:
    """Compare runs: a ranked table, what two of them differ in, and the page of `loratune compare`."""
    studio = studio_of(request)
    names = list(dict.fromkeys(request.query_params.getlist("run")))
    if len(names) < 2:
        raise RecipeError("choose two or more runs to compare", fix="go back, and tick their boxes")
    places = [studio.open_run(name) for name in names]
    if request.query_params.get("page"):
        text = await anyio.to_thread.run_sync(lambda: render_page(comparison_page([read_run(p) for p in places])))
        return whole_page(text)
    roots: list[str | Path] = [place.root for place in places]
    table = await anyio.to_thread.run_sync(ranked_table, roots)
    blocks: list[Any] = [as_block(table, str(table.title), numeric=True)]
    if len(places) == 2:
        found = diff(*places)
        same = Paragraph(text="The two runs do not differ.")
        blocks.append(as_block(difference_table(found, *places), "How they differ") if found else same)
    else:
        page = await anyio.to_thread.run_sync(lambda: comparison_page([read_run(p) for p in places]))
        blocks += [block for section in page.sections if section.name == "settings" for block in section.blocks]
    query = "&".join(["page=1", *(request.url.query.split("&"))])
    return show("compare.html", request, names=names, blocks=blocks, query=query)


async def chat_view(request: Request) -> Response:
    """Show the chat with base and fine-tuned model; a model is loaded with the first question."""
    studio = studio_of(request)
    place = studio.open_run(request.query_params.get("path", ""))
    place.require_adapter()
    name = studio.places.short(place.root)
    return show("chat.html", request, name=name, command=command("chat", as_word(name)))


async def answer_view(request: Request) -> Response:
    """Send a model's answer as lines of JSON, piece by piece."""
    studio, form = studio_of(request), await read_form(request)
    place = studio.open_run(form.get("path", ""))
    place.require_adapter()
    asked = _question(form.get("request", ""))
    helper = await studio.helpers.chat(studio.places.short(place.root))

    async def lines() -> AsyncIterator[str]:
        try:
            async with aclosing(helper.stream("answer", **asked)) as pieces:
                async for kind, value in pieces:
                    yield json.dumps({kind: value}) + "\n"
        except LoratuneError as error:
            yield json.dumps({"error": str(error)}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _question(text: str) -> dict[str, Any]:
    """Return what is asked, checked.

    Raises:
        RecipeError: It has another form.
    """
    try:
        values = json.loads(text)
        turns = [{"user": str(turn["user"]), "answers": _answers(turn["answers"])} for turn in values["turns"]]
        asked = {"side": str(values["side"]), "text": str(values["text"]), "system": str(values["system"])}
        numbers = {"temperature": float(values["temperature"]), "max_new_tokens": int(values["max_new_tokens"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise RecipeError(f"not a question: {type(error).__name__}", fix="reload the page") from None
    good = asked["side"] in ("base", "tuned") and asked["text"].strip() and len(turns) <= MOST_TURNS
    if not good or not 0 <= numbers["temperature"] <= 10 or not 1 <= numbers["max_new_tokens"] <= 100_000:
        raise RecipeError("a value of the question is out of range", fix="reload the page")
    return {**asked, **numbers, "turns": turns}


def _answers(values: dict[str, Any]) -> dict[str, str]:
    return {side: str(text) for side, text in values.items() if side in ("base", "tuned")}


ROUTES = [
    Route("/", home_view),
    Route("/run", run_view),
    Route("/run/events", events_view),
    Route("/run/stop", stop_view, methods=["POST"]),
    Route("/run/resume", resume_view, methods=["POST"]),
    Route("/run/export", export_view, methods=["POST"]),
    Route("/run/report", report_view),
    Route("/run/chat", chat_view),
    Route("/run/answer", answer_view, methods=["POST"]),
    Route("/job", job_view),
    Route("/compare", compare_view),
]
