"""Work shared with helper processes; the results come in order, and are the same without helpers.

Helpers are new Python processes (`loratune.data.masking.worker`), not forks: this process may have threads of torch and of the
tokenizer, and the user's own main program must not be imported again. They talk in pickles over their standard input
and output, and end when these close, so that none outlives this process. This process works too, from the first moment.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, Self, TypeVar

from loratune.run.errors import LoratuneError

T = TypeVar("T")
R = TypeVar("R")

CONVERSATIONS_PER_HELPER = 20_000
"""A helper takes a second or two to start, in which this process prepares several thousand conversations alone."""

MAX_HELPERS = 7
"""Reading and sending the rows remains the work of one process, so many more would wait for it."""


def num_helpers(num_conversations: int) -> int:
    """How many helpers repay their start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, MAX_HELPERS, num_conversations // CONVERSATIONS_PER_HELPER)


class WorkerPool(Generic[T, R]):
    """This process and its helpers. Leaving the context ends the helpers, whatever happened.

    Args:
        work: What this process does with a batch.
        setup: What a helper makes the same `work` from; see `loratune.data.masking.worker`.
        num_helpers: How many helpers to start.
    """

    def __init__(self, work: Callable[[Sequence[T]], R], *, setup: Any, num_helpers: int) -> None:
        self._work = work
        self._setup = setup
        self._num_helpers = num_helpers
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._batches: Sequence[Sequence[T]] = ()
        self._todo: list[int] = []  # the next one last
        self._under_way: set[int] = set()
        self._results: dict[int, R] = {}
        self._errors: dict[int, LoratuneError] = {}

    def __enter__(self) -> Self:
        self._helpers = [_start_helper() for _ in range(self._num_helpers)]
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._todo.clear()
        for helper in self._helpers:
            helper.kill()
        for thread in self._threads:
            thread.join()
        for helper in self._helpers:
            helper.wait()
            for stream in (helper.stdin, helper.stdout):
                assert stream is not None
                with suppress(OSError):  # what was not yet sent cannot be any more
                    stream.close()

    def map(self, batches: Sequence[Sequence[T]], progress: Callable[[int], None] | None = None) -> list[R]:
        """The results of all batches, in their order. To be called once.

        Args:
            batches: What is to be done.
            progress: Called with how much was done since it was last called.

        Raises:
            LoratuneError: That of the first batch that has one.
        """
        self._batches = batches
        self._todo = list(range(len(batches)))[::-1]
        setup = pickle.dumps(self._setup) if self._helpers else b""
        for helper in self._helpers:
            self._threads.append(threading.Thread(target=self._lead, args=(helper, setup), daemon=True))
            self._threads[-1].start()
        told: set[int] = set()
        while (number := self._take(wait=True)) is not None:
            self._do(number)
            new = self._results.keys() - told
            if progress is not None:
                progress(sum(len(batches[n]) for n in new))
            told |= new
        if self._errors:
            raise self._errors[min(self._errors)]
        if progress is not None:
            progress(sum(len(batches[n]) for n in self._results.keys() - told))
        return [self._results[number] for number in range(len(batches))]

    def _do(self, number: int) -> None:
        try:
            self._finish(number, self._work(self._batches[number]))
        except LoratuneError as error:
            self._finish(number, error)

    def _take(self, *, wait: bool) -> int | None:
        """The next batch; None where there is none left, after waiting for those under way."""
        with self._changed:
            while True:
                # After an error, only what stands before it matters.
                if self._todo and self._todo[-1] < min(self._errors, default=len(self._batches)):
                    self._under_way.add(self._todo[-1])
                    return self._todo.pop()
                if not wait or not self._under_way:
                    return None
                self._changed.wait()

    def _finish(self, number: int, result: R | LoratuneError) -> None:
        with self._changed:
            self._under_way.discard(number)
            if isinstance(result, LoratuneError):
                self._errors[number] = result
            else:
                self._results[number] = result
            self._changed.notify_all()

    def _lead(self, helper: subprocess.Popen[bytes], setup: bytes) -> None:
        """Give a helper batches as long as there are any. One that died leaves its batch to the others."""
        number = None
        assert helper.stdin is not None
        assert helper.stdout is not None
        try:
            helper.stdin.write(setup)
            helper.stdin.flush()
            pickle.load(helper.stdout)  # noqa: S301 - ready; from a process that this one started
            while (number := self._take(wait=False)) is not None:
                pickle.dump(self._batches[number], helper.stdin, protocol=pickle.HIGHEST_PROTOCOL)
                helper.stdin.flush()
                self._finish(number, pickle.load(helper.stdout))  # noqa: S301
        except (OSError, EOFError, pickle.PickleError):
            with self._changed:
                if number is not None:
                    self._under_way.discard(number)
                    self._todo = sorted([*self._todo, number], reverse=True)
                self._changed.notify_all()


def _start_helper() -> subprocess.Popen[bytes]:
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
        start_new_session=True,  # Ctrl-C is for this process, which ends its helpers
    )
