"""The pages of sweeps: followed while they run, and ranked as `loratune sweep` ranks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio.to_thread
from starlette.routing import Route

from loratune.cli.studio.pages import events, fragment, go_to, read_form, show, studio_of, whole_page
from loratune.cli.studio.sweeps import SweepSoFar, begun_sweep, read_sweep
from loratune.reporting.html import render_page
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from loratune.workflows.search.folder import SweepDir

if TYPE_CHECKING:
    from markupsafe import Markup
    from starlette.requests import Request
    from starlette.responses import Response

    from loratune.cli.studio.jobs import Job
    from loratune.cli.studio.pages import Studio

_MEASURED = ("finished", "time is up")


async def sweep_view(request: Request) -> Response:
    """Show a sweep: the trials as far as they are, ranked, with a link to the run of each."""
    studio = studio_of(request)
    folder, name = _folder(studio, request.query_params.get("path", ""))
    job = studio.jobs.latest(name)
    found = await _read(folder, job)
    values: dict[str, Any] = {
        "name": name,
        "sweep": found,
        "live": _live(name, found),
        "job": job,
        "again": "" if job is None else job.line,
        "log": "" if job is None else studio.jobs.output(job),
        "best": studio.places.short(folder.best) if found.state in _MEASURED and folder.best.is_file() else "",
    }
    return show("sweep.html", request, **values)


def _folder(studio: Studio, path: str) -> tuple[SweepDir, str]:
    root = studio.places.inside(path)
    return SweepDir(root), studio.places.short(root)


async def _read(folder: SweepDir, job: Job | None) -> SweepSoFar:
    """Read the sweep; while its command prepares the data, and if it ended there, there is nothing to read."""
    if job is not None and not folder.plan.is_file():
        return begun_sweep(folder, is_running=job.is_running)
    found = await anyio.to_thread.run_sync(read_sweep, folder)
    is_starting = job is not None and job.is_running and found.state != "running"
    return begun_sweep(folder, is_running=True) if is_starting else found


def _live(name: str, found: SweepSoFar) -> Markup:
    return fragment("sweep_live.html", name=name, sweep=found)


async def sweep_events_view(request: Request) -> Response:
    """Send what is new about a sweep, until its state changes."""
    studio = studio_of(request)
    folder, name = _folder(studio, request.query_params.get("path", ""))

    async def read() -> dict[str, str]:
        job = studio.jobs.latest(name)
        found = await _read(folder, job)
        log = "" if job is None else studio.jobs.output(job)
        return {"state": found.state, "live": _live(name, found), "log": log}

    return events(request, read)


async def sweep_page_view(request: Request) -> Response:
    """Show the page that the sweep wrote, read again from its result."""
    folder, _ = _folder(studio_of(request), request.query_params.get("path", ""))
    found = await anyio.to_thread.run_sync(read_sweep, folder)
    return whole_page(render_page(found.page))


async def stop_sweep_view(request: Request) -> Response:
    """Do what Ctrl-C does."""
    studio, form = studio_of(request), await read_form(request)
    folder, name = _folder(studio, form.get("path", ""))
    studio.jobs.stop(RunDir(folder.root))
    return go_to("/sweep", path=name)


async def continue_sweep_view(request: Request) -> Response:
    """Run the command again that started the sweep here."""
    studio, form = studio_of(request), await read_form(request)
    _, name = _folder(studio, form.get("path", ""))
    job = studio.jobs.latest(name)
    if job is None:
        raise RecipeError("the sweep was not started here", fix="run the command again that started it")
    studio.jobs.start(job.words, about=name, source=job.source)
    return go_to("/sweep", path=name)


ROUTES = [
    Route("/sweep", sweep_view),
    Route("/sweep/events", sweep_events_view),
    Route("/sweep/page", sweep_page_view),
    Route("/sweep/stop", stop_sweep_view, methods=["POST"]),
    Route("/sweep/continue", continue_sweep_view, methods=["POST"]),
]
