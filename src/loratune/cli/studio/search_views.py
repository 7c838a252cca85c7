"""What the pages of `sweep` and `tune` have in common: they are followed, stopped and continued in the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from starlette.routing import Route

from loratune.cli.studio.pages import events, go_to, read_form, studio_of
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from markupsafe import Markup
    from starlette.requests import Request
    from starlette.responses import Response

    from loratune.cli.studio.jobs import Job
    from loratune.cli.studio.sweeps import SweepSoFar
    from loratune.cli.studio.tunes import TuneSoFar


Found = TypeVar("Found", "SweepSoFar", "TuneSoFar")


def told_of_failure(found: Found, result: Path, job: Job | None) -> Found:
    """Say so if the last command has failed after the result was written: what is shown is not what it was to find."""
    is_older = result.is_file() and job is not None and result.stat().st_mtime < job.started
    if not is_older or job is None or job.is_running or not job.code:
        return found
    words = f"The last command ended with exit code {job.code}; its output is below. Found before it: {found.summary}"
    return replace(found, state="failed", summary=words)


def search_events(
    request: Request, read: Callable[[], Awaitable[tuple[SweepSoFar | TuneSoFar, Markup, Job | None]]]
) -> Response:
    """Send what is new about a search, until its state changes.

    Args:
        request: The request for the events.
        read: Returns how far the search is, the part of the page that shows it, and the command.
    """

    async def news() -> dict[str, str]:
        found, live, job = await read()
        log = "" if job is None else studio_of(request).jobs.output(job)
        return {"state": found.state, "live": live, "log": log}

    return events(request, news)


async def stop_search_view(request: Request) -> Response:
    """Do what Ctrl-C does."""
    studio, form = studio_of(request), await read_form(request)
    root = studio.places.inside(form.get("path", ""))
    studio.jobs.stop(RunDir(root))
    return go_to(_page(request), path=studio.places.short(root))


async def continue_search_view(request: Request) -> Response:
    """Run the command again that started the search here."""
    studio, form = studio_of(request), await read_form(request)
    name = studio.places.short(studio.places.inside(form.get("path", "")))
    job = studio.jobs.latest(name)
    if job is None:
        raise RecipeError("the search was not started here", fix="run the command again that started it")
    studio.jobs.start(job.words, about=name, source=job.source)
    return go_to(_page(request), path=name)


def _page(request: Request) -> str:
    """Return the page whose button was pressed."""
    return request.url.path.rpartition("/")[0]


ROUTES = [
    Route(f"/{verb}/{what}", view, methods=["POST"])
    for verb in ("sweep", "tune")
    for what, view in (("stop", stop_search_view), ("continue", continue_search_view))
]
