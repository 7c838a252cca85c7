"""The studio's server: its routes behind the guard, on 127.0.0.1."""

from __future__ import annotations

import logging
import secrets
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from loratune.cli.studio import draft_views, run_views, search_views, sweep_views, tune_views
from loratune.cli.studio.guard import Guard
from loratune.cli.studio.helper import Helpers
from loratune.cli.studio.jobs import Jobs
from loratune.cli.studio.pages import STATIC, Studio, read_static, show_error
from loratune.cli.studio.places import StudioFolder
from loratune.run.errors import LoratuneError, MachineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path
    from types import FrameType

    from starlette.requests import Request
    from starlette.types import ASGIApp

HOST = "127.0.0.1"
USUAL_PORT = 8321


def studio_app(folder: Path, *, token: str, port: int) -> ASGIApp:
    """Return the studio of a folder, behind its guard.

    Args:
        folder: The folder that holds data, recipes and runs.
        token: The secret of its URL.
        port: The port that it will listen on.

    Raises:
        RecipeError: There is no such folder.
    """
    places = StudioFolder.of(folder)
    studio = Studio(places=places, jobs=Jobs(places), helpers=Helpers(places.root))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await studio.helpers.close()

    views = (run_views, sweep_views, tune_views, search_views, draft_views)
    app = Starlette(
        routes=[*(route for view in views for route in view.ROUTES), Route("/static/{name}", _static)],
        exception_handlers={LoratuneError: show_error},
        lifespan=lifespan,
    )
    app.state.studio = studio
    return Guard(app, token=token, port=port)


def serve_studio(folder: Path, *, port: int | None, on_ready: Callable[[str], None]) -> None:
    """Serve the studio until Ctrl-C.

    Args:
        folder: The folder that holds data, recipes and runs.
        port: The port; None: the usual one, or a free one if it is taken.
        on_ready: Called with the URL, token included, when the port is open.

    Raises:
        RecipeError: There is no such folder.
        MachineError: The port is taken.
    """
    with _open_port(port) as listening:
        number = listening.getsockname()[1]
        token = secrets.token_urlsafe(24)
        app = studio_app(folder, token=token, port=number)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, server_header=False, ws="none"
        )
        on_ready(f"http://{HOST}:{number}/?token={token}")
        with suppress(KeyboardInterrupt):  # which it raises again when it has ended
            _Server(config).run(sockets=[listening])


class _Server(uvicorn.Server):
    """A server that, when it is told to end, does not report the open pages that it leaves."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def _open_port(port: int | None) -> socket.socket:
    problem = ""
    for number in (port,) if port is not None else (USUAL_PORT, 0):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, number))
            listening.listen(128)
        except OSError as error:
            listening.close()
            problem = f"port {number} cannot be opened: {error.strerror}"
            continue
        return listening
    raise MachineError(problem, fix="choose another one with --port, or leave it out for a free one")


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        raise HTTPException(404)
    return Response(read_static(name), media_type=STATIC[name])
