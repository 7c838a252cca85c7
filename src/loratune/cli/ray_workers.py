"""`loratune sweep --engine ray` and `tune --engine ray`: workers of a Ray cluster take the trials, several at once.

The command plans all trials, and decides at each rung which of them continue; a worker takes one trial at a time to the
next rung, as a run of one process on a GPU of its own, or on its share of the cores. Trials go to the workers as the
command prepared them, with their examples. The folder of the sweep, the current folder and the model's files must be at
the same paths on all machines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

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
from loratune.run.errors import LoratuneError, MachineError, RunError
from loratune.run.processes import LAUNCHER_VARIABLES
from loratune.run.progress import NoProgress
from loratune.run.records.files import read_record
from loratune.run.records.sweep import SweepPlanRecord, TrialLosses
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.legs import Legs
from loratune.workflows.search.shared_base import SharedBase
from loratune.workflows.search.trials import Trial

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
        recipe: What all trials share; its `train.device` says whether they may use GPUs.
        options: Cluster, number of workers, and how often each may be lost; `storage` is not used.
        progress: Receives what the workers print.

    Raises:
        MachineError: The cluster cannot be reached, or this machine cannot plan for its GPUs.
        Interrupted: The user stopped the command.
    """
    connect(options.address, options.workers)
    try:
        gpus = uses_gpus(recipe)
        check_placeable(options, gpus=gpus, is_own=not (options.address or os.environ.get("RAY_ADDRESS")))
        if gpus and not torch.cuda.is_available():
            raise MachineError(
                "the workers have GPUs, and this machine, which plans the trials, has none that torch can use",
                fix="run the command on a machine like theirs, or train.device=cpu",
            )
        warn_of_waiting("GPU" if gpus else "CPU", options.workers, progress)
        with stopped_with(_AGAIN):
            yield RayWorkers(options, progress, gpus=gpus)
    finally:
        ray.shutdown()


def check_placeable(options: RayOptions, *, gpus: bool, is_own: bool) -> None:
    """Check that a cluster that the command started has a GPU for each worker: no other machine will join it.

    Raises:
        MachineError: It has not.
    """
    available = int(ray.cluster_resources().get("GPU", 0))
    if gpus and is_own and available < options.workers:
        raise MachineError(
            f"--workers {options.workers} need a GPU each, and this machine has {available}",
            fix=f"--workers {available}, or train.device=cpu" if available else "train.device=cpu or auto",
        )


def cores_per_worker(cores: Sequence[int], workers: int) -> int:
    """Return the most cores that each worker can have, whatever machines they are on; at least one.

    Args:
        cores: Cores of each machine.
        workers: Number of workers.
    """
    most = max(1, sum(cores) // workers)
    return next((each for each in range(most, 1, -1) if sum(n // each for n in cores) >= workers), 1)


class RayWorkers:
    """Workers of a Ray cluster (`workflows.search.workers.Workers`).

    Args:
        options: How many there are, and how often each may be lost.
        progress: Receives what they print.
        gpus: Whether each has a GPU.
    """

    def __init__(self, options: RayOptions, progress: TerminalProgress, *, gpus: bool) -> None:
        self.size = options.workers
        self._progress, self._gpus = progress, gpus
        self._failures = {"max_restarts": options.max_failures, "max_task_retries": options.max_failures}
        self._mailbox: Any = ray.remote(num_cpus=0, scheduling_strategy=here())(Mailbox).remote()
        self._free: list[Any] = []
        self._under_way: dict[Any, tuple[Any, int]] = {}

    @contextmanager
    def on(self, folder: SweepDir, trials: Sequence[Trial]) -> Iterator[None]:
        """Start the workers for the sweep in a folder, and end them with the context."""
        number = min(self.size, len(trials))
        # Ray limits a worker's threads to its cores: on GPUs one is enough, and on CPUs all of them compute.
        machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cores = 1 if self._gpus else cores_per_worker(machines, number)
        kind = ray.remote(num_cpus=cores, num_gpus=int(self._gpus), **self._failures)(_Worker)
        prepared = ray.put(list(trials))  # together, since they share model and examples
        workers = [kind.remote(folder, prepared, str(Path.cwd()), self._mailbox) for _ in range(number)]
        self._free, self._under_way = list(workers), {}
        try:
            yield
        finally:
            with suppress(RayError):  # what ended the sweep is told, not that its last lines are lost
                self._show()
            for worker in workers:  # which frees the memory that the plans of the next sweep count on
                ray.kill(worker)

    def submit(self, trial: Trial, rung: int) -> None:
        """Let a free worker take a trial to a rung."""
        worker = self._free.pop()
        self._under_way[worker.take.remote(trial.number, rung)] = (worker, trial.number)

    def result(self) -> tuple[int, TrialLosses]:
        """Wait for any of the trials under way; return its number and its losses at the rung."""
        done: list[Any] = []
        while not done:
            done, _ = ray.wait(list(self._under_way), timeout=POLL_SECONDS)
            self._show()
        worker, number = self._under_way.pop(done[0])
        losses = _result_of(done[0], number)
        self._free.append(worker)
        return number, losses

    def _show(self) -> None:
        for line in ray.get(self._mailbox.drain.remote()).splitlines():
            if line.startswith(_WARNING):
                self._progress.warn(line.removeprefix(_WARNING))
            else:
                self._progress.line(line)


def _result_of(reference: Any, number: int) -> TrialLosses:
    """Return what a worker found; raise its error, or that it was lost."""
    try:
        losses = ray.get(reference)
    except RayTaskError:  # a bug, shown with the worker's traceback
        raise
    except OutOfMemoryError as error:
        raise MachineError(
            f"trial {number}: Ray ended its worker, since the machine's memory was nearly full",
            fix=f"a smaller --workers; {_AGAIN}",
        ) from error
    except RayError as error:
        raise RunError(
            f"trial {number}: its worker was lost: it was killed, or its machine is gone",
            fix=f"{_AGAIN}; --max-failures does so automatically",
        ) from error
    if isinstance(losses, LoratuneError):
        raise losses
    return cast("TrialLosses", losses)


class _Worker:
    """Takes trials of one sweep, one after the other; an actor of Ray, which starts it anew if it is lost.

    Args:
        folder: The sweep's folder, with its plan.
        trials: The trials, as the command prepared them.
        cwd: The current folder of the command: paths in a recipe may be relative.
        mailbox: Receives what is printed.
    """

    def __init__(self, folder: SweepDir, trials: Sequence[Trial], cwd: str, mailbox: Any) -> None:
        # Those of the launcher that started Ray here; each trial is a run of one process.
        for name in (*LAUNCHER_VARIABLES, "SLURM_STEP_ID"):
            os.environ.pop(name, None)
        self._folder, self._trials, self._cwd, self._mailbox = folder, trials, cwd, mailbox
        self._base = SharedBase()

    def take(self, number: int, rung: int) -> TrialLosses | LoratuneError:
        """Take a trial to a rung; return its losses there, or the error that ends the sweep."""
        trial, progress = self._trials[number - 1], _TrialProgress(self._mailbox, number)
        try:
            enter(self._cwd)
            if not trial.prepared.model.base.path.exists():
                raise RunError(
                    "the model's files are not on this worker's machine",
                    file=trial.prepared.model.base.path,
                    fix="keep them in a folder that all machines share; HF_HOME moves those of the Hub",
                )
            plan = read_record(self._folder.plan, SweepPlanRecord)
            legs = Legs(self._folder, plan, self._base, progress)
            return legs.known(trial, rung) or legs.take(trial, rung)
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
        # Awaited, so that the command has heard all of a trial when it hears of its end.
        ray.get(self._mailbox.write.remote("".join(f"{mark}{line}\n" for line in named.splitlines())))
