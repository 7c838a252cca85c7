"""Work shared with worker processes; results come in order, and are the same without workers.

Workers are new Python processes (`loratune.data.masking.worker`), not forks: this process may have threads of torch and
of the tokenizer, and the user's own main program must not be imported again, as `multiprocessing` does. They exchange
pickles over their standard input and output, and end when these close, so that none outlives this process. This process
works too, from the start.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from loratune.run.errors import LoratuneError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
R = TypeVar("R")

CONVERSATIONS_PER_WORKER = 20_000
"""A worker takes a second or two to start, in which this process prepares several thousand conversations alone."""

MAX_WORKERS = 7
"""Reading and sending the rows remains the work of one process, which more workers would wait for."""


def num_workers(num_conversations: int) -> int:
    """Return how many workers are worth starting."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, MAX_WORKERS, num_conversations // CONVERSATIONS_PER_WORKER)


class WorkerPool(Generic[T, R]):
    """This process and its workers. Leaving the context ends the workers, whatever happened.

    Args:
        work: The function of a batch that this process runs.
        setup: The arguments from which a worker makes the same function; see `loratune.data.masking.worker`.
        num_workers: Number of workers to start.
    """

    def __init__(self, work: Callable[[Sequence[T]], R], *, setup: Any, num_workers: int) -> None:
        self._work = work
        self._setup = setup
        self._num_workers = num_workers
        self._workers: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._batches: Sequence[Sequence[T]] = ()
        self._todo: list[int] = []  # the next one last
        self._in_progress: set[int] = set()
        self._results: dict[int, R] = {}
        self._errors: dict[int, LoratuneError] = {}

    def __enter__(self) -> Self:
        self._workers = [_start_worker() for _ in range(self._num_workers)]
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._todo.clear()
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                assert stream is not None
                with suppress(OSError):  # of unsent data in the buffer
                    stream.close()

    def map(self, batches: Sequence[Sequence[T]], progress: Callable[[int], None] | None = None) -> list[R]:
        """Return the results of all batches, in their order. To be called once.

        Args:
            batches: The batches.
            progress: Called with the number of items finished since the last call.

        Raises:
            LoratuneError: The error of the first batch that has one.
        """
        self._batches = batches
        self._todo = list(range(len(batches)))[::-1]
        setup = pickle.dumps(self._setup) if self._workers else b""
        for worker in self._workers:
            self._threads.append(threading.Thread(target=self._lead, args=(worker, setup), daemon=True))
            self._threads[-1].start()
        reported: set[int] = set()
        while (number := self._take(wait=True)) is not None:
            self._do(number)
            new = self._results.keys() - reported
            if progress is not None:
                progress(sum(len(batches[n]) for n in new))
            reported |= new
        if self._errors:
            raise self._errors[min(self._errors)]
        if progress is not None:
            progress(sum(len(batches[n]) for n in self._results.keys() - reported))
        return [self._results[number] for number in range(len(batches))]

    def _do(self, number: int) -> None:
        try:
            self._finish(number, self._work(self._batches[number]))
        except LoratuneError as error:
            self._finish(number, error)

    def _take(self, *, wait: bool) -> int | None:
        """Return the next batch; None if none is left, after waiting for those in progress."""
        with self._changed:
            while True:
                # After an error, only the batches before it matter.
                if self._todo and self._todo[-1] < min(self._errors, default=len(self._batches)):
                    self._in_progress.add(self._todo[-1])
                    return self._todo.pop()
                if not wait or not self._in_progress:
                    return None
                self._changed.wait()

    def _finish(self, number: int, result: R | LoratuneError) -> None:
        with self._changed:
            self._in_progress.discard(number)
            if isinstance(result, LoratuneError):
                self._errors[number] = result
            else:
                self._results[number] = result
            self._changed.notify_all()

    def _lead(self, worker: subprocess.Popen[bytes], setup: bytes) -> None:
        """Feed a worker batches as long as there are any. If it dies, its batch goes back to the others."""
        number = None
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(setup)
            worker.stdin.flush()
            pickle.load(worker.stdout)  # noqa: S301 - "ready", from a process that this one started
            while (number := self._take(wait=False)) is not None:
                pickle.dump(self._batches[number], worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
                worker.stdin.flush()
                self._finish(number, pickle.load(worker.stdout))  # noqa: S301
        except (OSError, EOFError, pickle.PickleError):
            with self._changed:
                if number is not None:
                    self._in_progress.discard(number)
                    self._todo = sorted([*self._todo, number], reverse=True)
                self._changed.notify_all()


def _start_worker() -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "loratune.data.masking.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which ends its workers
    )
