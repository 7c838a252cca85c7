"""The part of the server that computes: one thread, one base, and any number of adapters on it.

Requests are decoded in turns, a few tokens each, every one of them alone: what a request is answered does not depend on
what else is asked at the same time. Only this thread touches the model, so adapters come and go between two turns.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from loratune.evaluation.decode import CHUNK, Continuation
from loratune.evaluation.generate import as_generator
from loratune.evaluation.sampling import Sampling, generation_config
from loratune.model.device import free_memory, is_out_of_memory
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from peft import PeftModel

_SEEDS = 2**63
_SEED_STEP = 1_000_003
"""Keeps the seeds of one answer's turns apart from those of another one with the next seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How many requests the server takes.

    Attributes:
        at_once: How many are decoded in turns; each of them holds keys and values in memory.
        queue: How many further ones may wait.
    """

    at_once: int = 16
    queue: int = 64


class QueueFullError(RunError):
    """As many requests as may wait are waiting."""


class UnknownModelError(RecipeError):
    """A request names a model that is not served."""


@dataclass(slots=True, kw_only=True, eq=False)
class GenerationJob:
    """A request to generate an answer.

    Attributes:
        model: The name of the model; that of the base for no adapter.
        prompt: The tokens of the prompt, at least one.
        sampling: How tokens are chosen, and how many.
        stops: The tokens that end an answer, at least one.
        on_tokens: Called with new tokens, in the engine's thread.
        on_end: Called once, in the engine's thread: with None, or with why there is no answer.
    """

    model: str
    prompt: list[int]
    sampling: Sampling
    stops: tuple[int, ...]
    on_tokens: Callable[[list[int]], None]
    on_end: Callable[[Exception | None], None]
    continuation: Continuation | None = field(default=None, init=False)
    num_tokens: int = field(default=0, init=False)
    cancelled: bool = field(default=False, init=False)


class Engine:
    """Answers requests to a base and its adapters.

    Args:
        model: The base with its first adapter.
        first: The name of the adapter that it has already.
        base_name: The name of the base in requests.
        capacity: How many requests are answered at the same time, and how many wait.
    """

    def __init__(self, model: PeftModel, first: str, *, base_name: str, capacity: Capacity) -> None:
        self._model, self._base_name = model, base_name
        self._base: Any = model.get_base_model()  # which PEFT does not return once no adapter is left
        self._at_once, self._queue = capacity.at_once, capacity.queue
        self._names, self._leaving = {first}, set[str]()
        # PEFT's names are those of modules: no dot may be in them, and nothing that a module has, such as `half`.
        self._keys: dict[str, str] = {first: str(model.active_adapter)}
        self._num_loaded = 0
        self._waiting: deque[GenerationJob] = deque()
        self._active: list[GenerationJob] = []
        self._commands: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._using: str | None = None
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the base and of all adapters that requests may name."""
        with self._changed:
            return (self._base_name, *sorted(self._names))

    def submit(self, job: GenerationJob) -> None:
        """Queue a request.

        Raises:
            UnknownModelError: The model is not served.
            QueueFullError: Too many requests are waiting.
            RunError: The server is about to end.
        """
        with self._changed:
            if self._stopping:
                raise RunError("the server is about to end", fix="ask again when it has been started again")
            if job.model not in self._names and job.model != self._base_name:
                names = ", ".join((self._base_name, *sorted(self._names)))
                raise UnknownModelError(f"no model {job.model!r} is served", fix=f"one of {names}")
            if len(self._waiting) + len(self._active) >= self._at_once + self._queue:
                raise QueueFullError(
                    f"the queue is full: {len(self._active)} being answered, {len(self._waiting)} waiting",
                    fix="ask again later, or start the server with a larger --queue",
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: GenerationJob) -> None:
        """Drop a request that nobody waits for anymore; what it holds is free after the current turn."""
        with self._changed:
            job.cancelled = True
            with suppress(ValueError):
                self._waiting.remove(job)
            self._changed.notify_all()

    def add(self, name: str, folder: Path) -> None:
        """Load a further adapter, and serve it.

        Raises:
            RecipeError: The name is taken.
        """
        with self._changed:
            if name in (*self._names, *self._leaving, self._base_name):
                raise RecipeError(f"a model {name!r} is served already", fix="choose another name, or unload it first")
            self._leaving.add(name)  # so that nobody else takes the name meanwhile
        try:
            self._call(lambda: self._load(name, folder))
            with self._changed:
                self._names.add(name)
        finally:
            with self._changed:
                self._leaving.discard(name)

    def remove(self, name: str) -> None:
        """Accept no more requests for an adapter, answer those that came before, and unload it.

        Raises:
            UnknownModelError: No adapter of this name is served.
        """
        with self._changed:
            if name not in self._names:
                raise UnknownModelError(f"no adapter {name!r} is served", fix=f"one of {', '.join(self._names)}")
            self._names.discard(name)
            self._leaving.add(name)
            self._changed.wait_for(
                lambda: self._stopping or all(job.model != name for job in (*self._waiting, *self._active))
            )
        try:
            self._call(lambda: self._delete(name))
        finally:
            with self._changed:
                self._leaving.discard(name)

    @property
    def load(self) -> tuple[int, int]:
        """The number of requests that are being answered, and of those that wait."""
        with self._changed:
            return len(self._active), len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping

    def stop(self) -> None:
        """End the thread; requests without an answer are told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _call(self, command: Callable[[], None]) -> None:
        """Run a command in the engine's thread, between two turns, and wait for it."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except Exception as error:  # noqa: BLE001 - raised again where it is waited for
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._changed:
            if self._stopping:
                raise RunError("the server is about to end", fix="start it again")
            self._commands.append(run)
            self._changed.notify_all()
        done.result()

    def _load(self, name: str, folder: Path) -> None:
        """Load an adapter; leave nothing of it behind if it cannot be loaded."""
        self._num_loaded += 1
        self._keys[name] = key = f"loaded_{self._num_loaded}"
        try:
            self._model.load_adapter(str(folder), adapter_name=key, torch_device=str(self._model.device))
        except BaseException:
            self._delete(name)
            raise
        self._model.eval()

    def _delete(self, name: str) -> None:
        key = self._keys.pop(name)
        if key not in self._model.peft_config:
            return
        others = [other for other in self._model.peft_config if other != key]
        if others:  # else PEFT chooses one, and warns
            self._model.set_adapter(others[0], inference_mode=True)
        self._model.delete_adapter(key)

    def _run(self) -> None:
        try:
            with as_generator(self._base, generation_config(Sampling(), (), 0)):
                while self._take_turn():
                    pass
        finally:
            with self._changed:
                self._stopping = True
                left, commands = [*self._active, *self._waiting], self._commands
                self._changed.notify_all()
            for command in commands:
                command()
            for job in left:
                job.on_end(RunError("the server was stopped before the answer was complete", fix="ask again"))

    def _take_turn(self) -> bool:
        """Run commands and decode some tokens of each request. Return whether there will be another turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._waiting or self._active or self._stopping)
            commands, self._commands = self._commands, []
            stopping = self._stopping
            while self._waiting and len(self._active) < self._at_once and not stopping:
                self._active.append(self._waiting.popleft())
            turn = list(self._active)
        for command in commands:
            command()
            self._using = None  # a deleted adapter is not the current one anymore
        if stopping:
            return False
        ended = {job for job in sorted(turn, key=lambda job: job.model) if self._advance(job)}
        with self._changed:
            self._active = [job for job in self._active if job not in ended]
            self._changed.notify_all()
        return True

    def _advance(self, job: GenerationJob) -> bool:
        """Decode some tokens of a request. Return whether it has ended."""
        if job.cancelled:
            return True
        try:
            self._use(job.model)
            new = self._decode(job)
        except Exception as error:  # noqa: BLE001 - of one request; the others are answered
            if is_out_of_memory(error):
                job.continuation = None
                free_memory()
            job.on_end(error)
            return True
        job.on_tokens(new)
        assert job.continuation is not None
        if job.continuation.left:
            return False
        job.on_end(None)
        return True

    def _decode(self, job: GenerationJob) -> list[int]:
        if job.continuation is None:
            settings = generation_config(job.sampling, job.stops, job.stops[0])
            job.continuation = Continuation(self._base, job.prompt, settings)
        if job.sampling.temperature > 0:
            # Of this request alone, so that what others draw in between changes nothing.
            torch.manual_seed((job.sampling.seed * _SEED_STEP + job.num_tokens) % _SEEDS)
        new = job.continuation.advance(CHUNK)
        job.num_tokens += len(new)
        return new

    def _use(self, name: str) -> None:
        """Let the model compute with this adapter, or as the base."""
        if name == self._using:
            return
        self._using = name
        tuner = self._model.base_model
        if name == self._base_name:
            tuner.disable_adapter_layers()
            return
        tuner.enable_adapter_layers()
        self._model.set_adapter(self._keys[name], inference_mode=True)
