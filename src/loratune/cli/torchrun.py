"""`--processes N`: torchrun starts the same command N times on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def run_torchrun(number: int, arguments: Sequence[str]) -> int:
    """Run `loratune` with these arguments in several processes; returns the exit code of the one that failed first, or 0.

    Args:
        number: Of processes, each with its share of the machine's cores.
        arguments: Of the command line.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # the processes tell their errors themselves
    try:
        run(parse_args([f"--nproc-per-node={number}", "-m", "loratune", *arguments]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # of a signal: as shells say it
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
