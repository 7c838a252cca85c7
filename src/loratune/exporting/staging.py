"""Write exports under a temporary name and rename them at the end, so that nothing unfinished looks finished."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loratune.run.errors import MachineError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPARE_BYTES = 64 * 2**20
"""Disk space for tokenizer, configuration and certificate, beyond the weights."""


def check_target(target: Path, *, needed_bytes: int = 0) -> None:
    """Check that an export can be written here.

    Raises:
        RecipeError: `target` exists and is not an empty folder.
        MachineError: The disk is too small.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RecipeError("already exists", file=target, fix="choose another folder, or remove it")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + SPARE_BYTES:
        raise MachineError(
            f"needs about {(needed_bytes + SPARE_BYTES) / 2**20:,.0f} MiB, but {free / 2**20:,.0f} MiB are free",
            file=target,
            fix="free some disk space, or choose another folder",
        )


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`: renamed to `target` when the block succeeds, deleted when it fails.

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
            f"cannot write: {error}", file=target, fix="free some disk space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
