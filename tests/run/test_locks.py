"""Locks that end with the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.run.locks import lock_file


def test_one_holder_at_a_time_or_several_who_share(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open("a+") as first, path.open("rb") as second, path.open("rb") as third:
        lock_file(first)
        with pytest.raises(OSError, match="unavailable"):
            lock_file(second, shared=True)
        first.close()
        lock_file(second, shared=True)
        lock_file(third, shared=True)
    with path.open("a+") as again:
        lock_file(again)
