"""Nothing looks finished before it is: output is written under a temporary name and renamed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratune.run.errors import MachineError, RecipeError

SPARE_BYTES = 64 * 2**20
"""Disk space for tokenizer, configuration and certificate."""


def check_target(target: Path, *, needed_bytes: int = 0) -> None:
    """Whether a folder may be made here.

    Raises:
        RecipeError: There is something already.
        MachineError: The disk has not enough space.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RecipeError("there is something already", file=target, fix="give another place, or remove it")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + SPARE_BYTES:
        raise MachineError(
            f"about {(needed_bytes + SPARE_BYTES) / 2**20:,.0f} MiB will be written, {free / 2**20:,.0f} MiB are free",
            file=target,
            fix="free some disk space, or give another place",
        )


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into. It becomes `target` when the block ends well, and is deleted when it does not.

    Raises:
        MachineError: The disk is full, or the folder cannot be written.
    """
    target = target.absolute()
    temporary = target.with_name(f".{target.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise MachineError(
            f"cannot write: {error}", file=target, fix="free some disk space, or give another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
