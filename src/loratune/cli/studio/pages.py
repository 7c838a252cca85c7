"""What every page of the studio has: the templates, the context of all routes, and errors as pages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import anyio
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse

from loratune.reporting.blocks import Table
from loratune.reporting.watch import READING_SHARE
from loratune.run.directory import RunDir
from loratune.run.errors import LoratuneError, RecipeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    import rich.table
    from starlette.requests import Request
    from starlette.responses import Response

    from loratune.cli.studio.helper import Helpers
    from loratune.cli.studio.jobs import Jobs
    from loratune.cli.studio.places import StudioFolder

MOST_FORM_BYTES = 2**20
_TONES = {"starting": "running", "failed": "stopped", "damaged": "stopped", "time is up": "stopped"}
"""States of runs and searches that look like another one."""
_SECONDS = 1.0
"""The least time between two readings of the files of a run or sweep."""
STATIC = {
    **dict.fromkeys(("page.css", "studio.css"), "text/css"),
    **dict.fromkeys(("studio.js", "chat.js"), "text/javascript"),
}
"""The files that pages load, and their types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Studio:
    """What the routes work with."""

    places: StudioFolder
    jobs: Jobs
    helpers: Helpers

    def run_at(self, name: str) -> RunDir:
        """Return the place of a run in the folder; there may be none yet.

        Raises:
            RecipeError: It is outside of the folder.
        """
        return RunDir.at(self.places.inside(name))

    def open_run(self, name: str) -> RunDir:
        """Return a run in the folder.

        Raises:
            RecipeError: It is outside of the folder, or not a run.
        """
        return RunDir.open(self.places.inside(name))


def studio_of(request: Request) -> Studio:
    """Return the studio that a request is for."""
    found = request.app.state.studio
    assert isinstance(found, Studio)
    return found


def show(template: str, request: Request, *, status: int = 200, **values: Any) -> Response:
    """Return a page, or a part of one."""
    folder = studio_of(request).places.root
    text = _environment().get_template(template).render(folder=folder, path=request.url.path, **values)
    # File names may hold bytes that are no text; Python keeps them as half characters, which no encoding can hold.
    return HTMLResponse(text.encode("utf-8", "backslashreplace"), status_code=status)


def fragment(template: str, **values: Any) -> Markup:
    """Return a part of a page."""
    text = _environment().get_template(template).render(**values).encode("utf-8", "backslashreplace").decode()
    return Markup(text)  # noqa: S704 - escaped by the template


def go_to(page: str, /, **query: str) -> Response:
    """Send the browser to another page, after a form."""
    return RedirectResponse(address(page, **query), status_code=303)


def address(page: str, /, **query: str) -> str:
    """Return the address of a page."""
    return f"{page}?{urlencode(query)}" if query else page


async def read_form(request: Request) -> Mapping[str, str]:
    """Return the fields of a form, each with its last value.

    Raises:
        RecipeError: The form is too large.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_FORM_BYTES:
            raise RecipeError("the form is too large", fix="write the recipe in a file")
    found = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[-1] for name, values in found.items()}


def whole_page(text: str) -> Response:
    """Return a page that brings its own style, and its hash in its own policy."""
    policy = text.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0].replace("&#39;", "'")
    headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
    return HTMLResponse(text.encode("utf-8", "backslashreplace"), headers=headers)


def events(request: Request, read: Callable[[], Awaitable[dict[str, str]]]) -> Response:
    """Send what changes as server-sent events, until its `state` is no longer the one that the page shows."""
    known = request.query_params.get("state", "")

    async def lines() -> AsyncIterator[str]:
        last = ""
        while not await request.is_disconnected():
            began = anyio.current_time()
            news = await read()
            text = json.dumps(news)
            if text != last:
                yield f"data: {text}\n\n"
                last = text
            if news["state"] != known:
                return
            await anyio.sleep(max(_SECONDS, (anyio.current_time() - began) / READING_SHARE))

    return StreamingResponse(lines(), media_type="text/event-stream")


async def show_error(request: Request, error: Exception) -> Response:
    """Return an error of ours as a page, or as JSON where a script asked."""
    assert isinstance(error, LoratuneError)
    status = 400 if isinstance(error, RecipeError) else 500
    if request.headers.get("accept", "").startswith("application/json"):
        return JSONResponse(error.as_dict(), status_code=status)
    return show("error.html", request, status=status, error=error, kind=type(error).__name__)


def as_block(table: rich.table.Table, caption: str, *, numeric: bool = False) -> Table:
    """Return a table for the terminal as one for a page."""
    from rich.text import Text

    cells = [[_plain(cell, Text) for cell in column.cells] for column in table.columns]
    heads = tuple(_plain(column.header, Text) for column in table.columns) if table.show_header else ()
    rows = tuple(zip(*cells, strict=True))
    return Table(caption=caption, columns=heads, rows=rows, numeric=numeric)


def _plain(cell: Any, text: Any) -> str:
    return str(text.from_markup(cell).plain) if isinstance(cell, str) else str(getattr(cell, "plain", cell))


@cache
def read_static(name: str) -> bytes:
    """Return a file that pages load; the style of reports is also the studio's."""
    package = "loratune.reporting" if name == "page.css" else "loratune.cli.studio"
    folder = "templates" if name == "page.css" else "static"
    return (resources(package) / folder / name).read_bytes()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("loratune.cli.studio"), PackageLoader("loratune.reporting")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["address"] = address
    environment.globals["tone"] = lambda state: _TONES.get(state, state)
    return environment
