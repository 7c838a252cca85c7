from __future__ import annotations

import platform

import psutil
import pytest

from loratune.model.device import free_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its free pages elsewhere")
def test_free_pages_of_the_heap_are_given_back() -> None:
    """Else a plan takes them for memory that the process needs: after compiling its bytecode, 326 MiB."""
    process, blocks = psutil.Process(), [bytes(2000) for _ in range(100_000)]
    kept = blocks[::1000]  # without these the heap would shrink by itself
    del blocks
    before = process.memory_info().rss
    free_memory()
    assert before - process.memory_info().rss > 100_000_000
    assert len(kept) == 100
