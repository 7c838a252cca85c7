"""Locks on files, on Unix and on Windows. The system releases them when the process ends, however it ends."""

from __future__ import annotations

import sys
from typing import IO

_BEYOND = 2**30
"""Position of the byte that is locked on Windows: beyond the contents, which others may read."""


def lock_file(stream: IO[str] | IO[bytes], *, shared: bool = False) -> None:
    """Lock an open file until it is closed.

    Args:
        stream: The file.
        shared: Whether others may hold a shared lock at the same time. On Windows every lock is exclusive.

    Raises:
        OSError: Another process holds a lock.
    """
    if sys.platform == "win32":
        import msvcrt

        stream.seek(_BEYOND)
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        stream.seek(0)
    else:
        import fcntl

        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
