"""The command, run in the process of the test."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune import __main__ as cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def loratune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loratune", *map(str, arguments)])
        before = signal.getsignal(signal.SIGPIPE)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert signal.getsignal(signal.SIGPIPE) == before, "a connection that is closed must not end a run"
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def recipe(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model:\n  name: {tiny_model}\n  dtype: float32\n"
        f"data:\n  train: {chat_files[0]}\n  eval: {chat_files[1]}\n"
        f"train:\n  output_dir: {tmp_path / 'run'}\n  epochs: 1\n  device: cpu\n  learning_rate: 1e-2\n"
        "evaluate:\n  metric: exact_match\n  max_new_tokens: 3\n"
    )
    return path
