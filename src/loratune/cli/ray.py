"""`--engine ray`: Ray Train starts the workers of a run, on a cluster or on this machine, and restarts them when one is
lost.

Ray is only the launcher, as torchrun is: it decides where and when workers run, and gives each its rank. They run
`workflows.train`, which connects them through `run.processes`, and continues from the newest checkpoint if workers of
the same launch began the run. The run directory and the current folder must be at the same paths on all machines.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import ray
import ray.train
from pyarrow.fs import FileSystem
from ray.train.backend import Backend
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer

from loratune.cli.output import show_plan
from loratune.cli.ray_cluster import (
    POLL_SECONDS,
    Mailbox,
    MailboxFile,
    connect,
    enter,
    here,
    stopped_with,
    uses_gpus,
    warn_of_waiting,
)
from loratune.cli.terminal import SafeConsole, TerminalProgress
from loratune.planning.auto import output_dir
from loratune.planning.preparation import Preparation
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import LoratuneError, RecipeError, RunError
from loratune.workflows.result import RunResult
from loratune.workflows.train import train


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """Settings of Ray for a run.

    Attributes:
        workers: Number of workers; each gets a GPU if the cluster has any and `train.device` allows it.
        address: Address of the cluster; None for `RAY_ADDRESS`, or a new cluster here that ends with the command.
        storage: Folder that all machines share, or URL, for Ray's own record of the run and copies of the checkpoints;
            default: the folder `ray` next to the run directory.
        max_failures: How often workers are restarted after one was lost.
    """

    workers: int
    address: str | None = None
    storage: str | None = None
    max_failures: int = 0


class _NoProcessGroup(TorchConfig):
    """A setup that does nothing. Ray's own starts a process group in which each worker sees all GPUs of its machine."""

    backend_cls = Backend
    train_func_context = nullcontext


class _WorkerProgress(TerminalProgress):
    """Progress that also reports metrics and checkpoints to Ray, which waits until all workers have reported."""

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
    """Run `workflows.train` in Ray workers.

    Args:
        recipe: The recipe.
        options: Cluster, storage and number of workers.
        written: The recipe as the user wrote it, kept in the run directory.
        overwrite: Whether an existing run may be deleted.
        progress: Receives output of the first worker.

    Raises:
        MachineError: The cluster cannot be reached.
        RecipeError: Ray cannot write to the storage.
        Interrupted: The user stopped the run.
        RunError: Workers were lost more often than `max_failures`.
        LoratuneError: As `workflows.train`, from the first worker that failed.
    """
    root = RunDir.at(output_dir(recipe)).root
    storage = _storage(options.storage, root)
    launch = uuid.uuid4().hex
    connect(options.address, options.workers)
    try:
        mailbox = ray.remote(num_cpus=0, scheduling_strategy=here())(Mailbox).remote()
        gpus = uses_gpus(recipe)
        warn_of_waiting("GPU" if gpus else "CPU", options.workers, progress)
        job = {
            "recipe": recipe,
            "written": written,
            "overwrite": overwrite,
            "launch": launch,
            "folder": str(Path.cwd()),
            "width": progress.console.width,
            "mailbox": mailbox,
        }
        trainer = TorchTrainer(
            _work,
            train_loop_config=job,
            torch_config=_NoProcessGroup(),
            scaling_config=ray.train.ScalingConfig(num_workers=options.workers, use_gpu=gpus),
            run_config=_run_config(f"{root.name}-{launch[:8]}", storage, options, recipe.train.keep_checkpoints),
        )
        try:
            result = _wait(trainer.fit, mailbox, root)
        except ray.train.TrainingFailedError as error:
            _raise(ray.get(mailbox.failure.remote()), error)
        _raise(ray.get(mailbox.failure.remote()), None)
    finally:
        ray.shutdown()
    progress.line(f"Ray's own record of the run: {result.path}")
    run = RunDir.open(root)
    return RunResult(run=run, evaluation=read_json(run.evaluation) if run.evaluation.is_file() else None)


def _run_config(name: str, storage: str, options: RayOptions, keep_checkpoints: int | None) -> ray.train.RunConfig:
    return ray.train.RunConfig(
        name=name,
        storage_path=storage,
        failure_config=ray.train.FailureConfig(max_failures=options.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=keep_checkpoints),
        logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),  # we report errors ourselves
    )


def _storage(given: str | None, root: Path) -> str:
    """Return an absolute folder, or a URL as it is. Checked here because Ray would fail later, with a traceback."""
    if given is None or "://" not in given:
        return str(Path(given).expanduser().resolve() if given is not None else root.parent / "ray")
    try:
        FileSystem.from_uri(given)
    except (ValueError, OSError) as error:
        raise RecipeError(
            f"Ray cannot write to --storage {given}: {error}",
            fix="use a folder that all machines share, or a URL such as s3://BUCKET/FOLDER",
        ) from error
    return given


def _wait(work: Callable[[], Any], mailbox: Any, root: Path) -> Any:
    """Run the work in a thread, and print what the workers write."""
    executor = ThreadPoolExecutor(1)
    try:
        with stopped_with(f"`loratune resume {root}` continues from the last checkpoint"):
            done = executor.submit(work)
            while True:
                finished = done.done()
                sys.stderr.write(ray.get(mailbox.drain.remote()))
                sys.stderr.flush()
                if finished:
                    return done.result()
                time.sleep(POLL_SECONDS)
    finally:
        executor.shutdown(wait=False)


def _raise(first: LoratuneError | None, failed: ray.train.TrainingFailedError | None) -> None:
    """Raise our own error, if there is one, instead of what Ray wraps around it."""
    if first is not None:
        raise first
    if failed is None:
        return
    if isinstance(failed, ray.train.ControllerError):
        raise RunError(
            f"Ray Train failed: {failed.controller_failure}",
            fix="check that --storage is a folder or URL that Ray can write to",
        ) from failed
    errors = [
        error
        for error in getattr(failed, "worker_failures", {}).values()
        if not isinstance(error, processes.LostPeerError)
    ]
    unexpected = [error for error in errors if not type(error).__module__.startswith("ray.")]
    if unexpected:  # our own error, if starting failed; otherwise a bug, shown with Ray's traceback
        raise next((error for error in unexpected if isinstance(error, LoratuneError)), failed)
    raise RunError(
        "workers were lost: they were killed, or their machine is gone",
        fix="`loratune resume RUN` continues from the last checkpoint; --max-failures does so automatically",
    ) from failed


def _work(job: Record) -> None:
    """Train in one worker."""
    mailbox = job["mailbox"]
    if ray.get(mailbox.failure.remote()) is not None:
        return  # Ray restarts workers after any error; this one would happen again
    rank = ray.train.get_context().get_world_rank()
    console = SafeConsole(
        file=cast("IO[str]", MailboxFile(mailbox)), quiet=rank > 0, width=job["width"], highlight=False, soft_wrap=True
    )
    progress = _WorkerProgress(console)

    def show(prepared: Preparation) -> None:
        show_plan(prepared, prepared.as_plan(), progress.console, samples=1, full=False)

    _set_environment(job["launch"])
    processes.start()
    try:
        enter(job["folder"])
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
        ray.get(mailbox.fail.remote(error))
        raise


def _set_environment(launch: str) -> None:
    """Set the environment variables that torchrun sets, for `run.processes`."""
    context = ray.train.get_context()
    endpoint = None
    if context.get_world_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            endpoint = (ray.util.get_node_ip_address(), free.getsockname()[1])
    address, port = broadcast_from_rank_zero(endpoint)
    os.environ.update(
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID=launch,
    )
