"""Serve several models of one base until SIGINT or SIGTERM: what `loratune serve RUN1 RUN2 ADAPTER` does."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uvicorn

from loratune.exporting.transformers_serve import BASE_NAME
from loratune.model.load import positions_of
from loratune.run.errors import MachineError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.serving.api import Api
from loratune.workflows.serving.engine import Capacity, Engine
from loratune.workflows.serving.listening import LOCAL_HOSTS, Service, check_access, choose_port, service_at
from loratune.workflows.serving.models import (
    ServedModel,
    ServedSource,
    check_served_names,
    load_first,
    open_source,
    require_one_base,
    served_model,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from loratune.model.load import BaseModel

_GRACE_SECONDS = 5
"""How long answers may go on after the server was asked to end."""


def serve_adapters(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key: str | None = None,
    capacity: Capacity = Capacity(),  # noqa: B008 - frozen
    progress: Progress = NO_PROGRESS,
    on_ready: Callable[[Service], None] = lambda _: None,
) -> None:
    """Serve models of one base until SIGINT or SIGTERM.

    Args:
        models: Runs and adapters' folders, each with `NAME=` before it if its folder's name will not do.
        host: The address to listen on.
        port: The port to listen on; None for 8000, or a free port where 8000 is taken.
        api_key: The key that requests must send; None for no key.
        capacity: How many requests are answered at the same time, and how many wait.
        progress: The listener for progress and warnings.
        on_ready: Called when the models answer.

    Raises:
        RecipeError: One of them is not a model, is of another base, or is more than updates of matrices; or other
            machines could send requests without a key.
        MachineError: The port is taken.
    """
    check_access("loratune", host, api_key)
    port = choose_port(host, port)
    sources = [open_source(text) for text in models]
    check_served_names([source.name for source in sources])
    model, base = load_first(sources[0], progress)
    for other in sources[1:]:
        require_one_base(sources[0], other, base, progress)
    served = {source.name: served_model(source, base) for source in sources}
    served[BASE_NAME] = replace(served[sources[0].name], name=BASE_NAME)
    engine = Engine(model, sources[0].name, base_name=BASE_NAME, capacity=capacity)

    api = Api(
        engine=engine,
        models=served,
        open_model=_opener(sources[0], base, progress),
        positions=positions_of(model.get_base_model().config),
        key=api_key,
        local_only=host in LOCAL_HOSTS,
    )
    names = (BASE_NAME, *(source.name for source in sources))
    service = service_at(host, port, server="loratune", models=names, needs_key=api_key is not None)
    try:
        for source in sources[1:]:
            engine.add(source.name, source.folder)
        _Server(_config(api, host, port), lambda: on_ready(service)).run()
    except SystemExit:  # uvicorn's way to say that it cannot listen
        raise MachineError(f"cannot listen on {host}:{port}", fix="choose another --port or --host") from None
    finally:
        engine.stop()


def _opener(first: ServedSource, base: BaseModel, progress: Progress) -> Callable[[str, str], tuple[ServedModel, Path]]:
    """Return what opens a further adapter of the same base, by path and name, while the server runs."""

    def open_model(path: str, name: str) -> tuple[ServedModel, Path]:
        check_served_names([name])
        source = replace(open_source(path), name=name)
        require_one_base(first, source, base, progress)
        return served_model(source, base), source.folder

    return open_model


def _config(api: Api, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        api.app(),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        lifespan="off",
    )


class _Server(uvicorn.Server):
    """A server that says when it listens, and ends on SIGINT and SIGTERM as if it had nothing more to do.

    uvicorn's own raises the signal again.
    """

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
