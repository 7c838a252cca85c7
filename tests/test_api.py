"""The package from Python: names, arguments as people give them, and what a notebook's cell prints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import loratune
from loratune.cli.terminal import TerminalProgress
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError


def test_every_public_name_is_listed_and_can_be_imported() -> None:
    listed = dir(loratune)
    for name in loratune.__all__:
        assert name in listed
        assert getattr(loratune, name) is getattr(loratune, name), name
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        loratune.tarin  # noqa: B018


@pytest.fixture
def recipe(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model: {{name: {tiny_model}, dtype: float32}}\n"
        f"data: {{train: {chat_files[0]}, eval: {chat_files[1]}}}\n"
        "train: {output_dir: run, epochs: 1, device: cpu, learning_rate: 1e-2}\n"
        "evaluate: {samples: 2, max_new_tokens: 3}\n"
    )
    return path


def test_verbs_take_paths_and_show_little(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = loratune.plan(str(recipe))
    assert len(repr(planned)) < 2000
    assert "20 examples" in repr(planned)
    result = loratune.train(recipe)
    assert len(repr(result)) < 2000
    assert result.verdict in repr(result)
    assert result.evaluation is not None
    assert [item["base"]["score"] for item in result.evaluation["items"]] == [None, None]
    assert Path("run/recipe.yaml").read_text() == recipe.read_text()
    assert "report: " in capsys.readouterr().err, "progress is shown without being asked for"
    with pytest.raises(RecipeError) as told:
        loratune.train(recipe)
    assert "overwrite=True" in told.value.fix
    loratune.train(recipe, overwrite=True, progress=loratune.NO_PROGRESS)
    assert capsys.readouterr().err == ""

    shutil.copytree("run", "again")
    assert loratune.diff("run", "again") == []
    explained = loratune.explain(recipe, fields=["lora.r", "batch_size"])
    assert [item.name for item in explained] == ["lora.r", "train.batch_size"]
    assert loratune.explain(recipe)[0].origin.endswith("mine.yaml:1")
    assert loratune.eject(recipe).script == Path("mine.py")
    compile(Path("mine.py").read_text(), "mine.py", "exec")
    path, _ = loratune.init("chat")
    assert path == Path("chat.yaml")


def test_progress_is_the_terminals_unless_another_is_given(finished_run: RunDir) -> None:
    assert not TerminalProgress.quiet
    assert loratune.report.__module__ == "loratune.reporting.html", "a verb without progress is not wrapped"
    assert loratune.report(str(finished_run.root)) == finished_run.report
