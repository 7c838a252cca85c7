"""Stopping in good order: what Ctrl-C and SIGTERM do while steps are taken."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from loratune.errors import Interrupted, Terminated
from loratune.progress import Progress
from loratune.run import RunDir


class StopRequest:
    """Whether the user wants the run to stop.

    Attributes:
        signal: The signal that said so; None while nothing did.
    """

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def as_error(self, problem: str, run: RunDir) -> Interrupted:
        """The error that ends the command with the signal's exit code."""
        kind = Terminated if self.signal == signal.SIGTERM else Interrupted
        return kind(problem, fix=f"`loratune resume {run.root}` goes on")

    def after(self, step: int, num_steps: int, run: RunDir) -> Interrupted:
        """The same, after a step that has a checkpoint."""
        return self.as_error(f"stopped after step {step} of {num_steps}, which is saved", run)


@contextmanager
def stopping_in_order(stop: StopRequest, progress: Progress) -> Iterator[None]:
    """While the context lasts, Ctrl-C and SIGTERM ask for a stop; a second one stops at once.

    Signals reach the main thread only; elsewhere (a notebook's worker, a server) they are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop:
            # Neither is an Exception, so nothing that survives foreign code swallows them.
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(Terminated.exit_code)
        stop.signal = number
        progress.warn("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
