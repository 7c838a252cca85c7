"""The processes of one run: which one this is, and the few things they say to each other.

A launcher (torchrun, accelerate, srun) starts the same command several times, and tells each process in its environment who
it is: RANK of WORLD_SIZE, LOCAL_RANK on its machine, and MASTER_ADDR and MASTER_PORT to meet at. `start` reads that, and then
takes it out of the environment: transformers and accelerate would shard the data, wrap the model and scale the loss by it, and
here every process trains its share of a step as if it were alone, on the one GPU that it sees. What the shares add up to, the
trainer sums by itself, with `all_reduce_sum`.

A run in one process asks the same questions, and none of this is started: `rank()` is 0, `size()` is 1, sums are what they are.
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

_WHO = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
"""By these transformers and accelerate see that a process is one of several."""

RENDEZVOUS_SECONDS = 1800
"""How long processes wait for each other at the start, as torch does."""

_POLL_SECONDS = 0.1
_FAILED = "failed"


class LostPeerError(RunError):
    """Another process is gone: it failed and said so itself, or it was killed, or its machine is not there any more."""


@dataclass(slots=True)
class _World:
    """Several processes.

    Attributes:
        rank: Of this one.
        size: How many there are.
        local_size: How many of them are on this machine.
        store: A small dictionary of texts that they share.
        connected: Whether they still work together.
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
    """How many processes a launcher's environment speaks of."""
    try:
        return int(environment.get("WORLD_SIZE") or _slurm(environment, "SLURM_STEP_NUM_TASKS") or 1)
    except ValueError:
        raise RecipeError(f"WORLD_SIZE is {environment.get('WORLD_SIZE')!r}, not a number") from None


def rank() -> int:
    """The number of this process, from 0; the first one talks to the terminal and writes all files."""
    if _world is not None:
        return _world.rank
    environment = {**_from_slurm(os.environ), **os.environ} if is_launched() else {}
    return int(environment.get("RANK") or 0)


def size() -> int:
    """The number of processes that work together at the moment."""
    return _world.size if _world and _world.connected else 1


def local_size() -> int:
    """How many of them share this machine's memory."""
    return _world.local_size if _world and _world.connected else 1


def is_main() -> bool:
    """Whether this is the process that talks and writes."""
    return rank() == 0


def is_connected() -> bool:
    """Whether several processes work together now."""
    return _world is not None and _world.connected


def start() -> None:
    """Meet the other processes, if a launcher started several; nothing otherwise, or the second time.

    Raises:
        RecipeError: The launcher's environment is incomplete, or it asks for what the recipe decides.
        RunError: The others cannot be reached.
    """
    global _world  # noqa: PLW0603 - which process this is belongs to the process
    if _world is not None or launched_size(os.environ) == 1:
        return
    _check_launcher(os.environ)
    environment = {**_from_slurm(os.environ), **os.environ}
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise RecipeError(
            f"one of several processes, but {' and '.join(missing)} not in the environment",
            fix="start it with torchrun; or with srun, after `export MASTER_PORT=29500 MASTER_ADDR=` the first node's name",
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
        raise RunError(f"the other processes cannot be reached: {error}", fix="MASTER_ADDR and MASTER_PORT") from error
    _world = _World(
        rank=number,
        size=count,
        local_size=hosts.count(socket.gethostname()),
        store=dist.PrefixStore("loratune", store),  # type: ignore[attr-defined]
    )
    for name in _WHO:
        os.environ.pop(name, None)


def _meet(store: Any, number: int, count: int) -> str:
    """A name that only the processes that run now have agreed on.

    torchrun (2.13) keeps its store when it starts processes again, with the addresses and words of those that are gone in it. So
    each one says a number that nobody used before, the first one answers with a number of its own and all that it heard, again
    whenever it hears another, and who finds its own number in the answer is in.
    """
    mine = uuid.uuid4().hex
    store.set(f"hello/{number}", mine)
    deadline = time.monotonic() + RENDEZVOUS_SECONDS

    def said(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    heard: list[str] = []
    while time.monotonic() < deadline:
        if number == 0:
            now = [said(f"hello/{other}") or "-" for other in range(count)]
            if now != heard:
                heard = now
                store.set("welcome", " ".join((mine, *heard)))
            if all(said(f"in/{other}") == mine for other in range(1, count)):
                return mine
        else:
            name, *welcome = said("welcome").split() or [""]
            if len(welcome) == count and welcome[number] == mine:
                store.set(f"in/{number}", name)
                return name
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"not all {count} came within {RENDEZVOUS_SECONDS:,} s")


def stop() -> None:
    """Part: from here on each process is alone, and the others are not waited for."""
    if _world is None or not _world.connected:
        return
    import torch.distributed as dist

    _world.connected = False
    dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all processes, the same bits in each.

    Raises:
        LostError: Another process is gone.
    """
    if size() > 1:
        import torch.distributed as dist

        with _explain_lost_peer():
            dist.all_reduce(tensor)


def gather(value: T) -> list[T]:
    """Everybody's value, in the order of their ranks.

    Raises:
        LostError: Another process is gone.
    """
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * size()
    with _explain_lost_peer():
        dist.all_gather_object(values, value)
    return values


def store_set(name: str, text: str) -> None:
    """Tell the others something that they wait for with `read`, however long it took to find out."""
    if size() > 1:
        assert _world is not None
        _world.store.set(name, text)


def store_wait(name: str) -> str:
    """What the first process published. It may take hours, which a sum over all processes would not wait.

    Raises:
        LostError: Another process failed, or is gone.
    """
    assert _world is not None
    with _explain_lost_peer():
        while not _world.store.check([name]):
            if _world.store.check([_FAILED]):
                raise LostPeerError("another process failed")
            time.sleep(_POLL_SECONDS)
        return str(_world.store.get(name).decode())


def launch_id() -> str:
    """What names this launch, and is the same when the launcher starts its processes again; empty without a launcher.

    torchrun invents an identity where all processes are on one machine; with several, the user gives one (`--rdzv-id`), or the
    process that started this one stands for it.
    """
    identity = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if identity != "none":
        return identity
    return "" if _world is None else f"{socket.gethostname()}:{os.getppid()}"


def first_failure(exit_code: int) -> int | None:
    """The exit code of the process that failed first, which has told its error; None where it is this one.

    Args:
        exit_code: Of this one.
    """
    if _world is None:
        return None
    mine = f"{_world.rank} {exit_code}"
    try:
        first = _world.store.compare_set(_FAILED, "", mine).decode()
    except RuntimeError:  # gone with the first process, which holds it where the launcher does not
        return exit_code
    return None if first == mine else int(first.split()[1])


@contextmanager
def _explain_lost_peer() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise lost_peer_error() from error


def lost_peer_error() -> LostPeerError:
    """The error of a process that cannot go on alone."""
    return LostPeerError(
        f"process {rank()} of {_world.size if _world else 1} lost another one: it was killed, or its machine is gone",
        fix="`loratune resume RUN` goes on from the last checkpoint; `torchrun --max-restarts` does so by itself",
    )


def _check_launcher(environment: Mapping[str, str]) -> None:
    """`accelerate launch` starts processes; how they compute is for the recipe to say."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise RecipeError(
            f"accelerate is configured for mixed precision ({precision})",
            fix="`accelerate launch --mixed_precision no`; model.dtype decides",
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise RecipeError(
                f"accelerate is configured for {name}; the recipe says what each process holds",
                fix="`accelerate launch --multi_gpu`, or torchrun; train.strategy decides",
            )


def _slurm(environment: Mapping[str, str], name: str) -> str | None:
    """A variable of srun; in a batch script without srun there is one process, whatever was asked for."""
    return environment.get(name) if "SLURM_STEP_ID" in environment else None


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, where srun started the processes."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    return {name: value for name, slurm in names.items() if (value := _slurm(environment, slurm)) is not None}


def _choose_gpu(local_rank: int) -> None:
    """Let this process see its own GPU only. Before CUDA starts: afterwards the variable is not read again."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local_rank)
    elif len(visible) == 1:  # the launcher chose, or the user wants none
        return
    elif local_rank < len(visible):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local_rank]
    else:
        raise RecipeError(
            f"process {local_rank} of this machine has no GPU: CUDA_VISIBLE_DEVICES is {','.join(visible)}",
            fix="as many processes as GPUs; or CUDA_VISIBLE_DEVICES= and train.device=cpu",
        )
