"""The HTTP side of the server: an OpenAI-compatible API in front of an `Engine`.

GET /health, GET /v1/models, POST /v1/chat/completions; POST /v1/load_lora_adapter and /v1/unload_lora_adapter with the
fields of vLLM's requests of these names.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loratune.run.errors import BadRow, LoratuneError
from loratune.workflows.serving.engine import Engine, GenerationJob, QueueFullError, UnknownModelError
from loratune.workflows.serving.listening import LOCAL_HOSTS
from loratune.workflows.serving.requests import (
    BadRequestError,
    ChatRequest,
    chunk,
    completion,
    error_body,
    header,
    read_request,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request

    from loratune.workflows.serving.models import ServedModel

BUSY_STATUS = 503
"""The HTTP status of a request for which there is no room in the queue."""
_LOOKS, _LOOK_SECONDS = 4, 0.05
"""How often, and at what distance, the server looks for a place in a full queue before it refuses a request."""
_MOST_BYTES = 16 * 2**20
_UNFINISHED = "�"


@dataclass(slots=True, kw_only=True)
class Api:
    """The server's state.

    Attributes:
        engine: Computes the answers.
        models: Name in requests → tokenizer and template.
        open_model: Opens a further adapter by path and name, checks that it fits, and returns its model and its folder.
        positions: The largest number of tokens of prompt and answer; None if the model does not say.
        key: The key that requests must send; None for none.
        local_only: Whether requests must name this machine as their host, so that no web page reaches the server by
            a name of its own.
    """

    engine: Engine
    models: dict[str, ServedModel]
    open_model: Callable[[str, str], tuple[ServedModel, Any]]
    positions: int | None
    key: str | None = None
    local_only: bool = True
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._guarded(self._list)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/load_lora_adapter", self._guarded(self._load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._guarded(self._unload), methods=["POST"]),
        ]
        return Starlette(routes=routes)

    # ---- requests

    def _guarded(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._check_caller(request)
                return await handle(request)
            except BadRequestError as error:
                return _error(error.status, str(error))
            except QueueFullError as error:
                return _error(BUSY_STATUS, str(error), {"Retry-After": "1"})
            except UnknownModelError as error:
                return _error(404, str(error))
            except LoratuneError as error:
                return _error(400, str(error))

        return guarded

    def _check_caller(self, request: Request) -> None:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        if self.local_only and host not in LOCAL_HOSTS:
            raise BadRequestError(f"the server answers requests to 127.0.0.1 or localhost, not to {host}", 403)
        if self.key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.key.encode()):
                raise BadRequestError("the API key is missing or wrong", 401)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":  # which no web page can send unasked
            raise BadRequestError("Content-Type must be application/json", 415)

    async def _body(self, request: Request) -> Any:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > _MOST_BYTES:
                raise BadRequestError(f"the request is larger than {_MOST_BYTES:,} bytes", 413)
        try:
            return json.loads(bytes(content))
        except ValueError as error:
            raise BadRequestError(f"the body is not JSON: {error}") from None

    async def _health(self, _: Request) -> Response:
        alive, (active, waiting) = self.engine.is_alive, self.engine.load
        state = {"status": "ok" if alive else "the decoder has ended", "answering": active, "waiting": waiting}
        return JSONResponse(state, 200 if alive else 500)

    async def _list(self, _: Request) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "loratune"} for name in self.engine.names]
        return JSONResponse({"object": "list", "data": models})

    async def _load(self, request: Request) -> Response:
        body = await self._body(request)
        name, path = _text_fields(body, "lora_name", "lora_path")
        async with self.changing:
            if name in self.engine.names:
                raise BadRequestError(f"a model {name!r} is served already; choose another name, or unload it first")
            model, folder = await run_in_threadpool(self.open_model, path, name)
            self.models[name] = model
            try:
                await run_in_threadpool(self.engine.add, name, folder)
            except BaseException:
                del self.models[name]
                raise
        return JSONResponse({"loaded": name})

    async def _unload(self, request: Request) -> Response:
        (name,) = _text_fields(await self._body(request), "lora_name")
        async with self.changing:
            await run_in_threadpool(self.engine.remove, name)
            del self.models[name]
        return JSONResponse({"unloaded": name})

    async def _chat(self, request: Request) -> Response:
        wanted = read_request(await self._body(request))
        if wanted.model not in self.engine.names:
            raise UnknownModelError(
                f"no model {wanted.model!r} is served", fix=f"one of {', '.join(self.engine.names)}"
            )
        answer = _Answer(self, wanted)
        await self._submit(answer.job)
        if wanted.stream:
            return _Stream(answer)
        return await answer.complete(request)

    async def _submit(self, job: GenerationJob) -> None:
        """Queue a request; before it is refused, give the places of clients that have just hung up time to be free."""
        for _ in range(_LOOKS):
            with suppress(QueueFullError):
                self.engine.submit(job)
                return
            await asyncio.sleep(_LOOK_SECONDS)
        self.engine.submit(job)


class _Answer:
    """An answer that is being generated."""

    def __init__(self, api: Api, request: ChatRequest) -> None:
        self.engine, self.request, self.model = api.engine, request, api.models[request.model]
        try:
            prompt = self.model.prompt_ids(request.messages)
        except BadRow as bad:
            raise BadRequestError(str(bad)) from None
        room = request.sampling.max_new_tokens if api.positions is None else api.positions - len(prompt)
        if room < 1 or not prompt:
            raise BadRequestError(f"the conversation has {len(prompt):,} tokens, the model {api.positions} positions")
        loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()

        def tell(event: list[int] | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        self.job = GenerationJob(
            model=request.model,
            prompt=prompt,
            sampling=replace(request.sampling, max_new_tokens=min(room, request.sampling.max_new_tokens)),
            stops=self.model.stops,
            on_tokens=tell,
            on_end=tell,
        )
        self.tokens: list[int] = []

    @property
    def reason(self) -> str:
        """Why the answer has ended, in OpenAI's words."""
        return "stop" if self.tokens and self.tokens[-1] in self.model.stops else "length"

    async def next(self) -> bool:
        """Wait for new tokens. Return whether there may be more.

        Raises:
            LoratuneError: There is no answer.
        """
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        self.tokens += event or []
        return event is not None

    async def complete(self, request: Request) -> Response:
        """Wait for the whole answer, as long as the client does."""
        leaving = asyncio.ensure_future(self.drop_when_gone(request.receive))
        try:
            while await self.next():
                pass
        except LoratuneError as error:
            return _error(500, str(error))
        except Exception as error:  # noqa: BLE001 - of this request; the client hears of it, and the server goes on
            return _error(500, f"{type(error).__name__}: {error}")
        finally:
            leaving.cancel()
            self.engine.cancel(self.job)
        text = self.model.text_of(self.tokens)
        counts = usage(self.job.prompt, self.tokens)
        return JSONResponse(completion(header(), self.request.model, text, self.reason, counts))

    async def drop_when_gone(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Wait until the client hangs up, and drop its request, so that it holds no place in the queue."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.engine.cancel(self.job)
        self.events.put_nowait(None)

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        head, name, sent = header(), self.request.model, ""
        try:
            yield _event(chunk(head, name, {"role": "assistant", "content": ""}))
            while await self.next():
                text = self.model.text_of(self.tokens)
                # A character may take several tokens, and what follows may change how the last one is written.
                if text.startswith(sent) and len(text) > len(sent) and not text.endswith(_UNFINISHED):
                    yield _event(chunk(head, name, {"content": text[len(sent) :]}))
                    sent = text
            rest = self.model.text_of(self.tokens)[len(sent) :]
            if rest:
                yield _event(chunk(head, name, {"content": rest}))
            yield _event(chunk(head, name, {}, self.reason))
            if self.request.with_usage:
                counts = usage(self.job.prompt, self.tokens)
                yield _event({**chunk(head, name, {}), "choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status is sent already; the client hears of it in an event
            yield _event(error_body(str(error), "server_error"))
        finally:
            self.engine.cancel(self.job)


class _Stream(StreamingResponse):
    """A streamed answer. Its request is dropped as well when the client is gone before the first piece."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(answer.pieces(), media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Starlette looks for a client that hung up only when there is a piece to send: too late for one that waits.
        leaving = asyncio.ensure_future(self._answer.drop_when_gone(receive))
        try:
            await super().__call__(scope, receive, send)
        finally:
            leaving.cancel()
            self._answer.engine.cancel(self._answer.job)


def _event(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(error_body(reason, kind), status, headers)


def _text_fields(body: Any, *names: str) -> list[str]:
    if not isinstance(body, dict) or body.keys() != set(names) or not all(isinstance(body[n], str) for n in names):
        raise BadRequestError(f"the body must be a JSON object with {' and '.join(names)}, and nothing else")
    return [body[name] for name in names]
