"""`loratune studio` on the command line."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.cli import before_training
from loratune.cli.studio.server import serve_studio
from loratune.run.errors import MachineError, RecipeError


def test_without_its_packages_the_command_that_installs_them_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object:
        return None if name == "uvicorn" else importlib.util.find_spec(name)

    monkeypatch.setattr(before_training, "find_spec", find_spec)
    result = CliRunner().invoke(app, ["studio", "--no-open"])
    assert result.exit_code == MachineError.exit_code
    assert "the studio needs uvicorn" in result.output
    assert "pip install 'starlette>=" in result.output
    assert "'uvicorn>=" in result.output


def test_a_folder_that_is_missing_and_a_port_that_is_taken_are_errors(tmp_path: Path) -> None:
    def never(url: str) -> None:
        pytest.fail(url)

    with pytest.raises(RecipeError, match="no such folder"):
        serve_studio(tmp_path / "nothing", port=None, on_ready=never)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MachineError, match="cannot be opened"):
            serve_studio(tmp_path, port=taken.getsockname()[1], on_ready=never)
