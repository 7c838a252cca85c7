"""`--engine ray`: Ray Train starts the workers of a run, on a cluster or here, and starts them again when one is lost.

Ray is the launcher, as torchrun is: it decides where workers run and when, and tells each who it is. What they do is
`workflows.train`, which meets the others through `world` and goes on from the newest checkpoint where workers of the same launch
began the run. The run directory, and the folder of the command, are at the same paths on all machines.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

import ray
import ray.train
from pyarrow.fs import FileSystem
from ray.train.backend import Backend
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loratune.cli.output import show_plan
from loratune.cli.terminal import SafeConsole, TerminalProgress
from loratune.planning.auto import output_dir
from loratune.planning.preparation import Preparation
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import Interrupted, LoratuneError, MachineError, RecipeError, RunError, Terminated
from loratune.workflows.result import RunResult
from loratune.workflows.train import train

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """How Ray runs it.

    Attributes:
        workers: How many; each has a GPU, where the cluster has some and `train.device` does not rule them out.
        address: Of a cluster; None for that of `RAY_ADDRESS`, or a new one on this machine that ends with the command.
        storage: Where Ray keeps its own record of the run, with copies of the checkpoints: a folder that all machines see, or a
            URL. By default a folder `ray` beside the run directory.
        max_failures: How often workers are started again after one was lost.
    """

    workers: int
    address: str | None = None
    storage: str | None = None
    max_failures: int = 0


class _OwnMeeting(TorchConfig):
    """Ray sets up nothing: it would start a process group of its own, with all GPUs of a machine visible to each worker."""

    backend_cls = Backend
    train_func_context = nullcontext


class _Mailbox:
    """Where workers leave what is for the user: what the first one says, and the first error that ends the run."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._failure: LoratuneError | None = None

    def say(self, text: str) -> None:
        self._said.append(text)

    def heard(self) -> str:
        """What was said since the last time."""
        text, self._said = "".join(self._said), []
        return text

    def fail(self, error: LoratuneError) -> None:
        self._failure = self._failure or error

    def failure(self) -> LoratuneError | None:
        return self._failure


class _MailboxFile(io.TextIOBase):
    """The terminal of the first worker."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def write(self, text: str) -> int:
        self._desk.say.remote(text)
        return len(text)


class _WorkerProgress(TerminalProgress):
    """Ray is told the metrics, and given the checkpoints. All workers report equally often, or Ray waits."""

    def metrics(self, record: Record) -> None:
        ray.train.report(record)

    def checkpoint(self, record: Record, folder: Path) -> None:
        kept = ray.train.Checkpoint.from_directory(folder) if processes.is_main() else None
        ray.train.report(record, checkpoint=kept)


def train_on_ray(
    recipe: Recipe,
    options: RayOptions,
    *,
    written: str | None = None,
    overwrite: bool = False,
    progress: TerminalProgress,
) -> RunResult:
    """`workflows.train` in workers of Ray.

    Args:
        recipe: What to do.
        options: Where, and by how many.
        written: The recipe as the user wrote it.
        overwrite: Whether a run that is there already may be deleted.
        progress: Who is told how it goes.

    Raises:
        MachineError: The cluster cannot be reached.
        RecipeError: The storage is nothing that Ray can write to.
        Interrupted: The user stopped it.
        RunError: Workers were lost more often than that.
        LoratuneError: As `workflows.train`, of the first worker that failed.
    """
    root = RunDir.at(output_dir(recipe)).root
    storage = _storage(options.storage, root)
    launch = uuid.uuid4().hex
    _connect(options.address, options.workers)
    try:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = ray.remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()  # not on a machine that may be lost
        gpus = _uses_gpus(recipe)
        _warn_of_waiting("GPU" if gpus else "CPU", options.workers, progress)
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "recipe": recipe,
                "written": written,
                "overwrite": overwrite,
                "launch": launch,
                "folder": str(Path.cwd()),
                "width": progress.console.width,
                "desk": desk,
            },
            torch_config=_OwnMeeting(),
            scaling_config=ray.train.ScalingConfig(num_workers=options.workers, use_gpu=gpus),
            run_config=ray.train.RunConfig(
                name=f"{root.name}-{launch[:8]}",
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=options.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.train.keep_checkpoints),
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),  # errors are told below
            ),
        )
        try:
            result = _wait(trainer.fit, desk, root)
        except ray.train.TrainingFailedError as error:
            _raise(ray.get(desk.failure.remote()), error)
        _raise(ray.get(desk.failure.remote()), None)
    finally:
        ray.shutdown()
    progress.line(f"Ray's own record of the run: {result.path}")
    run = RunDir.open(root)
    return RunResult(run=run, evaluation=read_json(run.evaluation) if run.evaluation.is_file() else None)


def _connect(address: str | None, workers: int) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address is not None:
            ray.init(address, log_to_driver=False, logging_level="error")
        else:  # a worker takes a core of what Ray counts, on a machine with fewer too
            cores = max(workers, os.cpu_count() or 1)
            ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError) as error:
        raise MachineError(
            f"the Ray cluster at {address} cannot be reached: {error}", fix="`ray status --address` should show it"
        ) from error


def _storage(given: str | None, root: Path) -> str:
    """A folder as Ray wants it, or a URL as it is. Ray finds a wrong one when its cluster is up, and ends in a traceback."""
    if given is None or "://" not in given:
        return str(Path(given).expanduser().resolve() if given is not None else root.parent / "ray")
    try:
        FileSystem.from_uri(given)
    except (ValueError, OSError) as error:
        raise RecipeError(
            f"--storage {given} is nothing that Ray can write to: {error}",
            fix="a folder that all machines see, or a URL such as s3://BUCKET/FOLDER",
        ) from error
    return given


def _uses_gpus(recipe: Recipe) -> bool:
    if recipe.train.device == "auto":
        return bool(ray.cluster_resources().get("GPU"))
    return recipe.train.device == "cuda"


def _warn_of_waiting(kind: str, workers: int, progress: TerminalProgress) -> None:
    """Ray waits for machines without end, and without a word here."""
    there = ray.cluster_resources().get(kind, 0)
    progress.line(f"Ray starts {workers} workers")
    if there < workers:
        progress.warn(f"the cluster has {there:.0f} {kind}s at the moment: Ray waits for {workers}")


def _wait(work: Callable[[], Any], desk: Any, root: Path) -> Any:
    """Do work that may take days in a thread, and pass on what the workers say. Signals reach this thread, and not a handler of
    Ray, which would end without an exit code."""

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        raise Terminated("stopped at once", fix=fix)

    fix = f"`loratune resume {root}` goes on from the last checkpoint"
    before = signal.signal(signal.SIGTERM, on_sigterm)
    executor = ThreadPoolExecutor(1)
    try:
        done = executor.submit(work)
        while True:
            finished = done.done()
            sys.stderr.write(ray.get(desk.heard.remote()))
            sys.stderr.flush()
            if finished:
                return done.result()
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        raise Interrupted("stopped at once", fix=fix) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        executor.shutdown(wait=False)


def _raise(first: LoratuneError | None, failed: ray.train.TrainingFailedError | None) -> None:
    """Raise what the user should know of a failure: our own error, rather than what Ray wraps around it."""
    if first is not None:
        raise first
    if failed is None:
        return
    if isinstance(failed, ray.train.ControllerError):
        raise RunError(
            f"Ray Train failed: {failed.controller_failure}",
            fix="--storage is to be a folder or URL that can be written",
        ) from failed
    errors = [
        error
        for error in getattr(failed, "worker_failures", {}).values()
        if not isinstance(error, processes.LostPeerError)
    ]
    unexpected = [error for error in errors if not type(error).__module__.startswith("ray.")]
    if unexpected:  # ours if there is one: the start failed; else a bug, with Ray's traceback
        raise next((error for error in unexpected if isinstance(error, LoratuneError)), failed)
    raise RunError(
        "workers were lost: killed, or their machine is gone",
        fix="`loratune resume RUN` goes on from the last checkpoint; `--max-failures` does so by itself",
    ) from failed


def _work(job: Record) -> None:
    """What each worker does."""
    desk = job["desk"]
    if ray.get(desk.failure.remote()) is not None:
        return  # Ray starts workers again after any error; this one would come again
    rank = ray.train.get_context().get_world_rank()
    console = SafeConsole(
        file=cast("IO[str]", _MailboxFile(desk)), quiet=rank > 0, width=job["width"], highlight=False, soft_wrap=True
    )
    progress = _WorkerProgress(console)

    def show(prepared: Preparation) -> None:
        show_plan(prepared, prepared.as_plan(), progress.console, samples=1, full=False)

    _introduce(job["launch"])
    processes.start()
    try:
        _enter(job["folder"])
        train(
            job["recipe"],
            written=job["written"],
            overwrite=job["overwrite"],
            progress=progress,
            on_plan=show,
        )
    except processes.LostPeerError:
        raise
    except LoratuneError as error:
        if rank > 0:
            error.problem = f"worker {rank}: {error.problem}"
        ray.get(desk.fail.remote(error))
        raise


def _introduce(launch: str) -> None:
    """Tell `world` who this worker is, in the words of torchrun."""
    context = ray.train.get_context()
    meeting = None
    if context.get_world_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            meeting = (ray.util.get_node_ip_address(), free.getsockname()[1])
    address, port = broadcast_from_rank_zero(meeting)
    os.environ.update(
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID=launch,
    )


def _enter(folder: str) -> None:
    """Go where the command was given: paths of a recipe may be relative."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise RecipeError(
            f"the folder of the command is not on the machine of a worker: {error}",
            fix="a folder that all machines share",
        ) from error
