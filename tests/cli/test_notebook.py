"""Progress in a notebook."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from loratune.cli import notebook
from loratune.cli.notebook import NotebookProgress, is_notebook, progress_here
from loratune.cli.terminal import TerminalProgress


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a notebook's cell shows, each update after the one before."""
    pages: list[str] = []
    module, display = ModuleType("IPython"), ModuleType("IPython.display")
    module.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display.HTML = lambda text: text  # type: ignore[attr-defined]

    def show(text: str, display_id: bool) -> Any:
        pages.append(text)
        return SimpleNamespace(update=pages.append)

    display.display = show  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return pages


def test_a_bar_says_how_far_it_is_and_how_long_it_takes(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(notebook.time, "monotonic", lambda: float(next(clock)))
    assert is_notebook()
    progress = progress_here()
    assert isinstance(progress, NotebookProgress)
    with progress.task("training", 4, "steps") as task:
        task.advance(note="loss <1>")
        assert '<progress value="1" max="4">' in shown[-1]
        assert "training: 1/4 steps loss &lt;1&gt; (" in shown[-1]
        assert " s left)" in shown[-1]
        task.advance(3)
    assert "training: 4/4 steps (" in shown[-1]
    assert "left" not in shown[-1]


def test_updates_are_not_sent_more_often_than_a_browser_shows(shown: list[str]) -> None:
    with NotebookProgress().task("reading", None, "rows") as task:
        for _ in range(1000):
            task.advance()
    assert len(shown) < 100
    assert "<progress></progress> reading: 1,000 rows" in shown[-1]


def test_lines_are_text(shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    progress = NotebookProgress()
    progress.line("a line")
    progress.warn("a warning")
    progress.metrics({})
    assert capsys.readouterr().out == "a line\n! a warning\n"
    assert not shown


def test_elsewhere_the_terminal_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert isinstance(progress_here(), TerminalProgress)
