"""`--processes N`: torchrun starts the same command N times on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def run_torchrun(number: int, arguments: Sequence[str]) -> int:
    """Run `loratune` in several processes, and return the exit code of the first one that failed, or 0.

    Args:
        number: Number of processes; each gets its share of the machine's cores.
        arguments: Command-line arguments after `loratune`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    # The processes report their errors themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args([f"--nproc-per-node={number}", "-m", "loratune", *arguments]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # a signal, encoded as shells do
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
