"""The page of `loratune tune`: both of its sweeps as they go on, and what was chosen, with the reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio.to_thread
from starlette.routing import Route

from loratune.cli.studio.pages import events, fragment, go_to, read_form, show, studio_of
from loratune.cli.studio.tunes import TuneSoFar, begun_tune, read_tune
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from loratune.workflows.search.folder import TuneDir

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from loratune.cli.studio.jobs import Job
    from loratune.cli.studio.pages import Studio


async def tune_view(request: Request) -> Response:
    """Show what was found so far, and in the end the recipe with it."""
    studio = studio_of(request)
    folder, name = _folder(studio, request.query_params.get("path", ""))
    job = studio.jobs.latest(name)
    found = await _read(folder, job)
    values: dict[str, Any] = {
        "name": name,
        "tune": found,
        "live": _live(studio, found),
        "job": job,
        "log": "" if job is None else studio.jobs.output(job),
        "recipe": studio.places.short(folder.recipe) if found.state == "finished" and folder.recipe.is_file() else "",
    }
    return show("tune.html", request, **values)


def _folder(studio: Studio, path: str) -> tuple[TuneDir, str]:
    root = studio.places.inside(path)
    return TuneDir(root), studio.places.short(root)


async def _read(folder: TuneDir, job: Job | None) -> TuneSoFar:
    """Read it; while its command prepares the data, and if it ended there, there is nothing to read."""
    works = job is not None and job.is_running
    if job is not None and not folder.rates.plan.is_file():
        return begun_tune(is_running=works)
    found = await anyio.to_thread.run_sync(read_tune, folder)
    if not works or found.state == "running":
        return found
    # Between the two sweeps, and before a continued one, the command holds neither of them.
    return TuneSoFar(state="running", summary=found.summary, stages=found.stages)


def _live(studio: Studio, found: TuneSoFar) -> Any:
    stages = [(stage, studio.places.short(stage.folder)) for stage in found.stages]
    return fragment("tune_live.html", tune=found, stages=stages)


async def tune_events_view(request: Request) -> Response:
    """Send what is new, until the state changes."""
    studio = studio_of(request)
    folder, name = _folder(studio, request.query_params.get("path", ""))

    async def read() -> dict[str, str]:
        job = studio.jobs.latest(name)
        found = await _read(folder, job)
        log = "" if job is None else studio.jobs.output(job)
        return {"state": found.state, "live": _live(studio, found), "log": log}

    return events(request, read)


async def stop_tune_view(request: Request) -> Response:
    """Do what Ctrl-C does."""
    studio, form = studio_of(request), await read_form(request)
    folder, name = _folder(studio, form.get("path", ""))
    working = folder.working()
    studio.jobs.stop(RunDir(folder.root if working is None else working.root))
    return go_to("/tune", path=name)


async def continue_tune_view(request: Request) -> Response:
    """Run the command again that started it here."""
    studio, form = studio_of(request), await read_form(request)
    folder, name = _folder(studio, form.get("path", ""))
    job = studio.jobs.latest(name)
    if job is None:
        raise RecipeError("it was not started here", fix="run the command again that started it")
    if folder.working() is None:
        studio.jobs.start(job.words, about=name, source=job.source)
    return go_to("/tune", path=name)


ROUTES = [
    Route("/tune", tune_view),
    Route("/tune/events", tune_events_view),
    Route("/tune/stop", stop_tune_view, methods=["POST"]),
    Route("/tune/continue", continue_tune_view, methods=["POST"]),
]
