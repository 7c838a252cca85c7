"""A Ray cluster: the connection, what its workers print, and how a command that waits for them is stopped."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loratune.cli.terminal import TerminalProgress
from loratune.recipe.recipe import Recipe
from loratune.run.errors import Interrupted, LoratuneError, MachineError, RecipeError, Terminated, plural

POLL_SECONDS = 0.2


class Mailbox:
    """Output of the first worker, and the first error that ends the run; an actor that the command polls."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failure: LoratuneError | None = None

    def write(self, text: str) -> None:
        self._lines.append(text)

    def drain(self) -> str:
        """Return what was written since the last call."""
        text, self._lines = "".join(self._lines), []
        return text

    def fail(self, error: LoratuneError) -> None:
        self._failure = self._failure or error

    def failure(self) -> LoratuneError | None:
        return self._failure


class MailboxFile(io.TextIOBase):
    """A text stream that writes to a mailbox: the terminal of the first worker."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def write(self, text: str) -> int:
        self._mailbox.write.remote(text)
        return len(text)


def connect(address: str | None, workers: int) -> None:
    """Connect to a cluster, or start one on this machine.

    Args:
        address: Its address; None for `RAY_ADDRESS`, or a new cluster here that ends with the command.
        workers: Number of workers, for which a new cluster has room.

    Raises:
        MachineError: The cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address is not None:
            ray.init(address, log_to_driver=False, logging_level="error")
        else:  # each worker needs one core of those that Ray counts, even if the machine has fewer
            cores = max(workers, os.cpu_count() or 1)
            ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError) as error:
        raise MachineError(
            f"the Ray cluster at {address} cannot be reached: {error}", fix="check it with `ray status --address`"
        ) from error


def uses_gpus(recipe: Recipe) -> bool:
    """Whether each worker gets a GPU: the cluster has some, and the recipe's device allows it."""
    if recipe.train.device == "auto":
        return bool(ray.cluster_resources().get("GPU"))
    return recipe.train.device == "cuda"


def warn_of_waiting(kind: str, workers: int, progress: TerminalProgress) -> None:
    """Warn if the cluster has too few devices: Ray would wait for them forever, silently."""
    available = ray.cluster_resources().get(kind, 0)
    progress.line(f"starting {plural(workers, 'Ray worker')}")
    if available < workers:
        progress.warn(f"the cluster has {available:.0f} {kind}s now; Ray waits until it has {workers}")


@contextmanager
def stopped_with(fix: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an error with what to do next.

    Signals reach this thread instead of Ray's handler, which would end the process without an exit code.

    Raises:
        Interrupted: The user stopped the command.
    """
    ended = False

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        nonlocal ended
        ended = True
        raise KeyboardInterrupt  # the only one that Ray lets through while it waits

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    except KeyboardInterrupt:
        raise (Terminated if ended else Interrupted)("stopped immediately", fix=fix) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def here() -> Any:
    """Return a scheduling strategy for this machine, since others may be lost."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def enter(folder: str) -> None:
    """Change to the folder of the command: paths in a recipe may be relative."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise RecipeError(
            f"the current folder does not exist on a worker's machine: {error}",
            fix="run the command in a folder that all machines share",
        ) from error
