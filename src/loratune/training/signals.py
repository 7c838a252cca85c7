"""Stopping in good order: what Ctrl-C and SIGTERM do while steps are taken."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from loratune.run import processes
from loratune.run.directory import RunDir
from loratune.run.errors import Interrupted, Terminated
from loratune.run.progress import Progress

ONE_STOP_SECONDS = 3.0
"""Of several processes each gets a Ctrl-C from the terminal, and the same once more from torchrun."""


class StopRequest:
    """Whether the user wants the run to stop.

    Attributes:
        asked: The signal that asked this process; None while nothing did.
        signal: The signal that all processes stop for; None while they do not.
    """

    asked: int | None = None
    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, number: int) -> None:
        """A signal came. Of several processes none stops before all know, or the others would wait for it."""
        self.asked = number
        if processes.size() == 1:
            self.signal = number

    def agree(self, asked: Iterable[int]) -> None:
        """Stop, if a process was asked to.

        Args:
            asked: The signals that came to the processes; 0 is none.
        """
        self.signal = max(asked, default=0) or self.signal

    def as_error(self, problem: str, run: RunDir) -> Interrupted:
        """The error that ends the command with the signal's exit code."""
        kind = Terminated if self.signal == signal.SIGTERM else Interrupted
        return kind(problem, fix=f"`loratune resume {run.root}` goes on")

    def after(self, step: int, num_steps: int, run: RunDir) -> Interrupted:
        """The same, after a step that has a checkpoint."""
        return self.as_error(f"stopped after step {step} of {num_steps}, which is saved", run)


@contextmanager
def stop_after_step(stop: StopRequest, progress: Progress) -> Iterator[None]:
    """While the context lasts, Ctrl-C and SIGTERM ask for a stop; a second one stops at once.

    Signals reach the main thread only; elsewhere (a notebook's worker, a server) they are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked_at = 0.0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if stop.asked is not None:
            if processes.size() > 1 and time.monotonic() - asked_at < ONE_STOP_SECONDS:
                return
            # Neither is an Exception, so nothing that survives foreign code swallows them.
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(Terminated.exit_code)
        asked_at = time.monotonic()
        stop.ask(number)
        progress.warn("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
