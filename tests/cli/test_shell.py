"""Which options belong to which engine, and what is said of an engine that is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.cli import shell
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (("--workers", 2), 2, "--workers is only for Ray"),
        (("--max-failures", 0), 2, "--max-failures is only for Ray"),
        (("--engine", "ray", "--processes", 2), 2, "--engine ray --workers 2"),
    ],
)
def test_options_of_another_engine_are_refused(
    loratune: Run, recipe: Path, options: tuple[object, ...], exit_code: int, words: str
) -> None:
    code, _, told = loratune("train", recipe, *options)
    assert (code, words in told) == (exit_code, True), told
    if "--processes" not in options:
        code, _, told = loratune("sweep", recipe, "lora.r=2,4", *options)
        assert (code, words in told) == (exit_code, True), told


def test_a_missing_ray_is_told_before_the_recipe_is_read(
    loratune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "find_spec", lambda name: None)
    code, _, told = loratune("train", tmp_path / "no.yaml", "--engine", "ray")
    assert code == 4
    assert "pip install 'ray[train]>=" in told
