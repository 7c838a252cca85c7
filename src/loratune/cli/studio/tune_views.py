"""The page of `loratune tune`: both of its sweeps as they go on, and what was chosen, with the reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio.to_thread
from starlette.routing import Route

from loratune.cli.studio.pages import fragment, show, studio_of
from loratune.cli.studio.search_views import search_events, told_of_failure
from loratune.cli.studio.tunes import TuneSoFar, begun_tune, read_tune
from loratune.workflows.search.folder import TuneDir

if TYPE_CHECKING:
    from markupsafe import Markup
    from starlette.requests import Request
    from starlette.responses import Response

    from loratune.cli.studio.jobs import Job
    from loratune.cli.studio.pages import Studio


async def tune_view(request: Request) -> Response:
    """Show what was found so far, and in the end the recipe with it."""
    studio = studio_of(request)
    folder, name = _tune_at(studio, request.query_params.get("path", ""))
    job = studio.jobs.latest(name)
    found = await _tune_so_far(folder, job)
    has_recipe = found.state == "finished" and folder.recipe.is_file()
    values: dict[str, Any] = {
        "verb": "tune",
        "name": name,
        "search": found,
        "live": _live_tune(studio, found),
        "job": job,
        "log": "" if job is None else studio.jobs.output(job),
        "tune": "",
        "recipe": studio.places.short(folder.recipe) if has_recipe else "",
        "recipe_words": "Recipe with these settings",
    }
    return show("tune.html", request, **values)


def _tune_at(studio: Studio, path: str) -> tuple[TuneDir, str]:
    folder = TuneDir(studio.places.inside(path))
    return folder, studio.places.short(folder.root)


async def _tune_so_far(folder: TuneDir, job: Job | None) -> TuneSoFar:
    """Read it; while its command prepares the data, and if it ended there, there is nothing to read."""
    works = job is not None and job.is_running
    if job is not None and not folder.rates.plan.is_file():
        return begun_tune(is_running=works)
    found = await anyio.to_thread.run_sync(lambda: read_tune(folder, works=works))
    return told_of_failure(found, folder.result, job)


def _live_tune(studio: Studio, found: TuneSoFar) -> Markup:
    stages = [(stage, studio.places.short(stage.folder)) for stage in found.stages]
    return fragment("tune_live.html", search=found, stages=stages)


async def tune_events_view(request: Request) -> Response:
    """Send what is new, until the state changes."""
    studio = studio_of(request)
    folder, name = _tune_at(studio, request.query_params.get("path", ""))

    async def read() -> tuple[TuneSoFar, Markup, Job | None]:
        job = studio.jobs.latest(name)
        found = await _tune_so_far(folder, job)
        return found, _live_tune(studio, found), job

    return search_events(request, read)


ROUTES = [Route("/tune", tune_view), Route("/tune/events", tune_events_view)]
