"""A clean stop: what Ctrl-C and SIGTERM do during training."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loratune.run import processes
from loratune.run.errors import Interrupted, Terminated

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

    from loratune.run.directory import RunDir
    from loratune.run.progress import Progress

ONE_STOP_SECONDS = 3.0
"""Signals within this time count as one: each of several processes gets Ctrl-C from the terminal and from torchrun."""


class StopRequest:
    """The user's request to stop the run; true once all ranks have agreed to stop.

    Attributes:
        asked: The signal that this process received; None: none so far.
        signal: The signal for which all ranks stop; None: they do not stop.
    """

    asked: int | None = None
    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, number: int) -> None:
        """Record a signal to this process."""
        self.asked = number
        # Several ranks stop only after `agree`: one that stopped alone would leave the others waiting for it.
        if processes.size() == 1:
            self.signal = number

    def agree(self, asked: Iterable[int]) -> None:
        """Stop if any rank was asked to.

        Args:
            asked: The signal that each rank received; 0 for none.
        """
        self.signal = max(asked, default=0) or self.signal

    def as_error(self, problem: str, run: RunDir) -> Interrupted:
        """Return the error that ends the command with the signal's exit code."""
        kind = Terminated if self.signal == signal.SIGTERM else Interrupted
        return kind(problem, fix=f"resume with `loratune resume {run.root}`")

    def after(self, step: int, num_steps: int, run: RunDir) -> Interrupted:
        """Return the same error for a stop after a step that has a checkpoint."""
        return self.as_error(f"stopped after step {step} of {num_steps} (checkpoint saved)", run)


@contextmanager
def stop_after_step(stop: StopRequest, progress: Progress) -> Iterator[None]:
    """Make Ctrl-C and SIGTERM ask for a stop after the current step, and a second signal stop immediately."""
    # Only the main thread may set handlers; in a notebook's worker or a server they stay as they are.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked_at = 0.0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if stop.asked is not None:
            if processes.size() > 1 and time.monotonic() - asked_at < ONE_STOP_SECONDS:
                return
            # Neither is an Exception: the handlers around trackers and evaluation, which catch those, let it pass.
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(Terminated.exit_code)
        asked_at = time.monotonic()
        stop.ask(number)
        progress.warn("stopping after this step; press Ctrl-C again to stop immediately")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
