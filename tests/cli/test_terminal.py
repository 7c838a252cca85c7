from __future__ import annotations

import io

import pytest
from rich.console import Console

from loratune.cli.terminal import TerminalProgress


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_time_left_loss_rate_and_memory_are_in_sight(width: int) -> None:
    """rich cuts what is too wide off at the right."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with TerminalProgress(console).task("training", 1200, "steps") as task:
        for _ in range(3):
            task.advance(100, "loss 2.3456 · 12,345 tokens/s · 12.3 GiB")
    shown = screen.getvalue()
    assert "300/1200" in shown
    assert "loss 2.3456 · 12,345 tokens/s · 12.3 GiB" in shown
    assert "left" in shown
    assert "…" not in shown


def test_without_a_terminal_there_are_plain_lines() -> None:
    lines = io.StringIO()
    progress = TerminalProgress(Console(file=lines, width=200, color_system=None))
    with progress.task("training", 10, "steps") as task:
        task._last_line -= 60
        task.advance(4, "loss 1.0")
    assert lines.getvalue() == "training: 4/10 steps loss 1.0\n"
