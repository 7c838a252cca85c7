"""The pages of sweeps: followed while they run, and ranked as `loratune sweep` ranks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio.to_thread
from starlette.routing import Route

from loratune.cli.studio.pages import fragment, show, studio_of, whole_page
from loratune.cli.studio.search_views import search_events, told_of_failure
from loratune.cli.studio.sweeps import SweepSoFar, begun_sweep, read_sweep
from loratune.reporting.html import render_page
from loratune.workflows.search.folder import SweepDir, TuneDir

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
    folder, name = _sweep_at(studio, request.query_params.get("path", ""))
    tune = _tune_around(studio, folder)
    job = studio.jobs.latest(tune or name)
    found = await _sweep_so_far(folder, None if tune else job)
    has_best = not tune and found.state in _MEASURED and folder.best.is_file()
    values: dict[str, Any] = {
        "verb": "sweep",
        "name": name,
        "search": found,
        "live": _live_sweep(name, found),
        "job": job,
        "log": "" if job is None else studio.jobs.output(job),
        "tune": tune,
        "recipe": studio.places.short(folder.best) if has_best else "",
        "recipe_words": "Recipe with the best settings",
    }
    return show("sweep.html", request, **values)


def _sweep_at(studio: Studio, path: str) -> tuple[SweepDir, str]:
    root = studio.places.inside(path)
    return SweepDir(root), studio.places.short(root)


def _tune_around(studio: Studio, folder: SweepDir) -> str:
    """Return the `loratune tune` that the sweep is a part of, which decides what becomes of it; else nothing."""
    around = TuneDir.around(folder.root)
    is_here = around is not None and around.root.is_relative_to(studio.places.root)
    return studio.places.short(around.root) if around is not None and is_here else ""


async def _sweep_so_far(folder: SweepDir, job: Job | None) -> SweepSoFar:
    """Read the sweep; while its command prepares the data, and if it ended there, there is nothing to read."""
    if job is not None and not folder.plan.is_file():
        return begun_sweep(folder, is_running=job.is_running)
    found = await anyio.to_thread.run_sync(read_sweep, folder)
    if job is not None and job.is_running and found.state != "running":
        return begun_sweep(folder, is_running=True)
    return told_of_failure(found, folder.result, job)


def _live_sweep(name: str, found: SweepSoFar) -> Markup:
    return fragment("sweep_live.html", name=name, sweep=found)


async def sweep_events_view(request: Request) -> Response:
    """Send what is new about a sweep, until its state changes."""
    studio = studio_of(request)
    folder, name = _sweep_at(studio, request.query_params.get("path", ""))
    tune = _tune_around(studio, folder)

    async def read() -> tuple[SweepSoFar, Markup, Job | None]:
        job = studio.jobs.latest(tune or name)
        found = await _sweep_so_far(folder, None if tune else job)
        return found, _live_sweep(name, found), job

    return search_events(request, read)


async def sweep_page_view(request: Request) -> Response:
    """Show the page that the sweep wrote, read again from its result."""
    folder, _ = _sweep_at(studio_of(request), request.query_params.get("path", ""))
    found = await anyio.to_thread.run_sync(read_sweep, folder)
    return whole_page(render_page(found.page))


ROUTES = [Route("/sweep", sweep_view), Route("/sweep/events", sweep_events_view), Route("/sweep/page", sweep_page_view)]
