"""`loratune sweep --engine ray` and `tune --engine ray`: workers of a Ray cluster take the trials, several at once.

The command plans all trials, and decides at each rung which of them continue; a worker takes one trial at a time to the
next rung, as a run of one process on a GPU of its own, or on its share of the cores. The folder of the sweep and the
current folder must be at the same paths on all machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayActorError

from loratune.cli.ray_cluster import (
    POLL_SECONDS,
    Mailbox,
    connect,
    enter,
    here,
    stopped_with,
    uses_gpus,
    warn_of_waiting,
)
from loratune.recipe.recipe import Recipe
from loratune.run.directory import Record
from loratune.run.errors import LoratuneError, MachineError, RunError
from loratune.run.progress import NoProgress
from loratune.run.records.files import read_record
from loratune.run.records.sweep import SweepPlanRecord, TrialLosses
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.legs import Legs
from loratune.workflows.search.shared_base import SharedBase
from loratune.workflows.search.trials import Trial, prepare_alone

if TYPE_CHECKING:
    from loratune.cli.ray import RayOptions
    from loratune.cli.terminal import TerminalProgress

_AGAIN = "run the same command again to continue"
_WARNING = "! "
"""What a warning begins with on its way to the command."""


@contextmanager
def ray_workers(recipe: Recipe, options: RayOptions, progress: TerminalProgress) -> Iterator[RayWorkers]:
    """Connect to a cluster, whose workers take trials until the context ends.

    Args:
        recipe: What all trials share.
        options: Cluster, number of workers, and how often each may be lost; `storage` is not used.
        progress: Receives what the workers print.

    Raises:
        MachineError: The cluster cannot be reached, or this machine cannot plan for its GPUs.
        Interrupted: The user stopped the command.
    """
    connect(options.address, options.workers)
    try:
        gpus = uses_gpus(recipe)
        if gpus and not torch.cuda.is_available():
            raise MachineError(
                "the workers have GPUs, and this machine, which plans the trials, has none",
                fix="run the command on a machine like theirs, or train.device=cpu",
            )
        warn_of_waiting("GPU" if gpus else "CPU", options.workers, progress)
        with stopped_with(_AGAIN):
            yield RayWorkers(options, progress, gpus=gpus)
    finally:
        ray.shutdown()


class RayWorkers:
    """Workers of a Ray cluster (`workflows.search.workers.Workers`).

    Args:
        options: How many there are, and how often each may be lost.
        progress: Receives what they print.
        gpus: Whether each has a GPU.
    """

    def __init__(self, options: RayOptions, progress: TerminalProgress, *, gpus: bool) -> None:
        self.size = options.workers
        self._progress = progress
        # Ray limits a worker's threads to its cores: on GPUs one is enough, and on CPUs all of them compute.
        cores = 1 if gpus else max(1, int(ray.cluster_resources().get("CPU", 1)) // self.size)
        failures = {"max_restarts": options.max_failures, "max_task_retries": options.max_failures}
        self._kind = ray.remote(num_cpus=cores, num_gpus=int(gpus), **failures)(_Worker)
        self._mailbox: Any = ray.remote(num_cpus=0, scheduling_strategy=here())(Mailbox).remote()
        self._free: list[Any] = []
        self._under_way: dict[Any, tuple[Any, int]] = {}

    @contextmanager
    def on(self, folder: SweepDir) -> Iterator[None]:
        """Start the workers for the sweep in a folder, and end them with the context."""
        workers = [self._kind.remote(folder, str(Path.cwd()), self._mailbox) for _ in range(self.size)]
        self._free, self._under_way = list(workers), {}
        try:
            yield
        finally:
            for worker in workers:  # which frees the memory that the plans of the next sweep count on
                ray.kill(worker)

    def submit(self, trial: Trial, rung: int) -> None:
        """Let a free worker take a trial to a rung."""
        worker = self._free.pop()
        reference = worker.take.remote(trial.number, rung, trial.prepared.recipe.model_dump(mode="json"))
        self._under_way[reference] = (worker, trial.number)

    def result(self) -> tuple[int, TrialLosses]:
        """Wait for any of the trials under way; return its number and its losses at the rung."""
        done: list[Any] = []
        while not done:
            done, _ = ray.wait(list(self._under_way), timeout=POLL_SECONDS)
            self._show()
        worker, number = self._under_way.pop(done[0])
        try:
            losses = ray.get(done[0])
        except RayActorError as error:
            raise RunError(
                f"trial {number}: its worker was lost: it was killed, or its machine is gone",
                fix=f"{_AGAIN}; --max-failures does so automatically",
            ) from error
        if isinstance(losses, LoratuneError):
            raise losses
        self._free.append(worker)
        return number, losses

    def _show(self) -> None:
        for line in ray.get(self._mailbox.drain.remote()).splitlines():
            if line.startswith(_WARNING):
                self._progress.warn(line.removeprefix(_WARNING))
            else:
                self._progress.line(line)


class _Worker:
    """Takes trials of one sweep, one after the other; an actor of Ray, which starts it anew if it is lost.

    Args:
        folder: The sweep's folder, with its plan.
        cwd: The current folder of the command: paths in a recipe may be relative.
        mailbox: Receives what is printed.
    """

    def __init__(self, folder: SweepDir, cwd: str, mailbox: Any) -> None:
        self._folder, self._cwd, self._mailbox = folder, cwd, mailbox
        self._base, self._trials = SharedBase(), dict[int, Trial]()

    def take(self, number: int, rung: int, resolved: Record) -> TrialLosses | LoratuneError:
        """Take a trial to a rung; return its losses there, or the error that ends the sweep."""
        progress = _TrialProgress(self._mailbox, number)
        try:
            enter(self._cwd)
            if number not in self._trials:
                like = next(iter(self._trials.values()), None)
                self._trials[number] = prepare_alone(self._folder, number, Recipe.parse(resolved), like, progress)
            plan = read_record(self._folder.plan, SweepPlanRecord)
            return Legs(self._folder, plan, self._base, progress).take(self._trials[number], rung)
        except LoratuneError as error:
            return error


class _TrialProgress(NoProgress):
    """Sends the lines of a trial to the command, each with the trial's number; bars of several trials are not shown."""

    def __init__(self, mailbox: Any, number: int) -> None:
        self._mailbox, self._name = mailbox, f"trial {number}"

    def line(self, text: str) -> None:
        self._send("", text)

    def warn(self, text: str) -> None:
        self._send(_WARNING, text)

    def _send(self, mark: str, text: str) -> None:
        named = text if text.startswith(self._name) else f"{self._name}: {text}"
        self._mailbox.write.remote("".join(f"{mark}{line}\n" for line in named.splitlines()))
