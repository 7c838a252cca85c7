"""The processes of one run: which one this is, and how they communicate.

A launcher (torchrun, accelerate, srun) starts the same command several times, and sets in the environment of each
process its RANK of WORLD_SIZE, its LOCAL_RANK on its machine, and MASTER_ADDR and MASTER_PORT of the rendezvous.
`start` reads these and then removes them from the environment: transformers and accelerate would shard the data, wrap
the model and scale the loss by them. Here, every process trains its share of a step as if it were alone, on the one GPU
that it sees, and the trainer sums the shares itself, with `all_reduce_sum`.

In a run of one process, nothing of this is started: `rank()` is 0, `size()` is 1, and sums leave values unchanged.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
"""Variables by which loratune, transformers and accelerate detect that a process is one of several."""

RENDEZVOUS_SECONDS = 1800
"""How long processes wait for each other at the start; torch's default."""

_POLL_SECONDS = 0.1
_FAILED = "failed"


class LostPeerError(RunError):
    """Another process is gone: it failed and reported it, it was killed, or its machine is unreachable."""


@dataclass(slots=True)
class _World:
    """A group of processes.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_size: Number of processes on this machine.
        store: A shared key-value store of short texts.
        connected: Whether the processes still work together.
    """

    rank: int
    size: int
    local_size: int
    store: Any
    connected: bool = True


_world: _World | None = None


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return _world is not None or launched_size(os.environ) > 1


def launched_size(environment: Mapping[str, str]) -> int:
    """Return the number of processes in a launcher's environment."""
    try:
        return int(environment.get("WORLD_SIZE") or _slurm(environment, "SLURM_STEP_NUM_TASKS") or 1)
    except ValueError:
        raise RecipeError(f"WORLD_SIZE is {environment.get('WORLD_SIZE')!r}, not a number") from None


def rank() -> int:
    """Return the number of this process, from 0; process 0 prints to the terminal and writes all files."""
    if _world is not None:
        return _world.rank
    environment = {**_from_slurm(os.environ), **os.environ} if is_launched() else {}
    return int(environment.get("RANK") or 0)


def size() -> int:
    """Return the number of processes that work together now."""
    return _world.size if _world and _world.connected else 1


def local_size() -> int:
    """Return the number of processes on this machine, which share its memory."""
    return _world.local_size if _world and _world.connected else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def is_connected() -> bool:
    """Whether several processes work together now."""
    return _world is not None and _world.connected


def start() -> None:
    """Connect to the other processes, if a launcher started several and they are not connected yet.

    Raises:
        RecipeError: The launcher's environment is incomplete, or sets what the recipe decides.
        RunError: The others cannot be reached.
    """
    global _world  # noqa: PLW0603 - the rank is a property of the process
    if _world is not None or launched_size(os.environ) == 1:
        return
    _check_launcher(os.environ)
    environment = {**_from_slurm(os.environ), **os.environ}
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise RecipeError(
            f"this is one of several processes, but the environment lacks {' and '.join(missing)}",
            fix="use torchrun; or srun, after `export MASTER_PORT=29500 MASTER_ADDR=` the first node's name",
        )
    _choose_gpu(int(environment.get("LOCAL_RANK") or 0))
    os.environ.update(environment)
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, number, count = next(rendezvous("env://"))
        store = dist.PrefixStore(_meet(store, number, count), store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
        hosts: list[str] = [""] * count
        dist.all_gather_object(hosts, socket.gethostname())
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the other processes cannot be reached: {error}", fix="check MASTER_ADDR and MASTER_PORT"
        ) from error
    _world = _World(
        rank=number,
        size=count,
        local_size=hosts.count(socket.gethostname()),
        store=dist.PrefixStore("loratune", store),  # type: ignore[attr-defined]
    )
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)


def _meet(store: Any, number: int, count: int) -> str:
    """Agree on a name that only the processes that run now know.

    torchrun (2.13) keeps its store when it restarts processes, with the addresses and messages of those that are gone.
    So each process sends a fresh random number; process 0 replies with its own number and all that it received, again
    whenever another arrives; a process that finds its own number in the reply has joined.
    """
    mine = uuid.uuid4().hex
    store.set(f"hello/{number}", mine)
    deadline = time.monotonic() + RENDEZVOUS_SECONDS

    def read(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    received: list[str] = []
    while time.monotonic() < deadline:
        if number == 0:
            now = [read(f"hello/{other}") or "-" for other in range(count)]
            if now != received:
                received = now
                store.set("welcome", " ".join((mine, *received)))
            if all(read(f"in/{other}") == mine for other in range(1, count)):
                return mine
        else:
            name, *welcome = read("welcome").split() or [""]
            if len(welcome) == count and welcome[number] == mine:
                store.set(f"in/{number}", name)
                return name
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"not all {count} processes started within {RENDEZVOUS_SECONDS:,} s")


def stop() -> None:
    """Disconnect: from here on, each process is alone and waits for no other."""
    if _world is None or not _world.connected:
        return
    import torch.distributed as dist

    _world.connected = False
    dist.destroy_process_group()


def stop_at_exit() -> None:
    """Disconnect a process that is about to end, with or without an error.

    At the end of the interpreter, gloo's threads (torch 2.13) may abort the process: its exit code is then SIGABRT's.
    NCCL is left alone, because destroying it waits for operations that the other processes began.
    """
    if not is_connected():
        return
    import torch.distributed as dist

    if dist.get_backend() == "gloo":
        stop()


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all processes, bit for bit the same in each.

    Raises:
        LostPeerError: Another process is gone.
    """
    if size() > 1:
        import torch.distributed as dist

        with _explain_lost_peer():
            dist.all_reduce(tensor)


def gather(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks.

    Raises:
        LostPeerError: Another process is gone.
    """
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * size()
    with _explain_lost_peer():
        dist.all_gather_object(values, value)
    return values


def store_set(name: str, text: str) -> None:
    """Publish a text for which the other processes wait with `store_wait`."""
    if size() > 1:
        assert _world is not None
        _world.store.set(name, text)


def store_wait(name: str) -> str:
    """Return what process 0 published with `store_set`.

    Raises:
        LostPeerError: Another process failed, or is gone.
    """
    # Polled, because it may take hours, and a collective operation would time out.
    assert _world is not None
    with _explain_lost_peer():
        while not _world.store.check([name]):
            if _world.store.check([_FAILED]):
                raise LostPeerError("another process failed")
            time.sleep(_POLL_SECONDS)
        return str(_world.store.get(name).decode())


def launch_id() -> str:
    """Return a name of this launch that stays the same when the launcher restarts its processes; empty without one."""
    # torchrun makes one up if all processes are on one machine; with several machines, it is the user's `--rdzv-id`, or
    # else the parent process identifies the launch.
    identity = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if identity != "none":
        return identity
    return "" if _world is None else f"{socket.gethostname()}:{os.getppid()}"


def first_failure(exit_code: int) -> int | None:
    """Return the exit code of the process that failed first and reported its error; None if it is this one.

    Args:
        exit_code: The exit code of this process.
    """
    if _world is None:
        return None
    mine = f"{_world.rank} {exit_code}"
    try:
        first = _world.store.compare_set(_FAILED, "", mine).decode()
    except RuntimeError:  # process 0 is gone, and held the store
        return exit_code
    return None if first == mine else int(first.split()[1])


@contextmanager
def _explain_lost_peer() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise lost_peer_error() from error


def lost_peer_error() -> LostPeerError:
    """Return the error of a process that cannot continue alone."""
    return LostPeerError(
        f"process {rank()} of {_world.size if _world else 1} lost another one: it was killed, or its machine is gone",
        fix="`loratune resume RUN` continues from the last checkpoint; `torchrun --max-restarts` does so automatically",
    )


def _check_launcher(environment: Mapping[str, str]) -> None:
    """Check that `accelerate launch` only starts processes: the recipe decides how they compute."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise RecipeError(
            f"accelerate is configured for mixed precision ({precision})",
            fix="`accelerate launch --mixed_precision no`; model.dtype decides",
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise RecipeError(
                f"accelerate is configured for {name}; the recipe decides what each process holds",
                fix="`accelerate launch --multi_gpu`, or torchrun; train.strategy decides",
            )


def _slurm(environment: Mapping[str, str], name: str) -> str | None:
    """Return a variable of srun; None in a batch script without srun, which is one process."""
    return environment.get(name) if "SLURM_STEP_ID" in environment else None


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what torchrun would have set, if srun started the processes."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    return {name: value for name, slurm in names.items() if (value := _slurm(environment, slurm)) is not None}


def _choose_gpu(local_rank: int) -> None:
    """Make only this process's own GPU visible; call before CUDA starts, which reads the variable once."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local_rank)
    elif len(visible) == 1:  # chosen by the launcher, or disabled by the user
        return
    elif local_rank < len(visible):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local_rank]
    else:
        raise RecipeError(
            f"process {local_rank} of this machine has no GPU: CUDA_VISIBLE_DEVICES is {','.join(visible)}",
            fix="start as many processes as GPUs; or set CUDA_VISIBLE_DEVICES= and train.device=cpu",
        )
