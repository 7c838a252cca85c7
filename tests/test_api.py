"""The package from Python: names, arguments as people give them, and what a notebook's cell prints."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import TrainerCallback, TrainerControl

import loratune
from loratune.cli.terminal import TerminalProgress
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from tests.conftest import conversation


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


class Counting(TrainerCallback):
    """Counts steps, and ends the run after some of them."""

    def __init__(self, last: int) -> None:
        self.last, self.seen = last, 0

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        self.seen += 1
        control.should_training_stop |= state.global_step >= self.last
        return control


def test_a_run_from_rows_in_memory_with_callbacks(tiny_model: Path, tmp_path: Path) -> None:
    recipe = loratune.Recipe(
        model={"name": str(tiny_model), "dtype": "float32"},
        data={"train": [conversation(i) for i in range(12)], "eval": [conversation(i) for i in range(20, 24)]},
        train={"output_dir": str(tmp_path / "run"), "max_steps": 4, "batch_size": 4, "device": "cpu"},
        evaluate={"samples": 2, "max_new_tokens": 3},
    )
    assert "<td>4</td>" in loratune.plan(recipe)._repr_html_()
    counting = Counting(last=3)
    result = loratune.train(recipe, callbacks=[counting], progress=loratune.NO_PROGRESS)
    assert counting.seen == 3
    assert result.metrics["loss"].count() == 3
    assert len(result.samples) == 2
    assert f"<b>{result.run.root}: " in result._repr_html_()
    assert "<td>held-out loss</td>" in result._repr_html_()

    again = loratune.open_result(str(result.run.root))
    assert repr(again) == repr(result)
    model, tokenizer = again.model(), again.tokenizer()
    ids = tokenizer("Color?", return_tensors="pt")
    with torch.no_grad():
        tuned = model(**ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(**ids).logits, tuned)
    assert tokenizer.chat_template
    assert loratune.evaluate(result.run.root, metric="contains", progress=loratune.NO_PROGRESS).evaluation[
        "metric"
    ] == ("contains")
    assert [Path(listed.run) for listed in loratune.runs(tmp_path)] == [result.run.root]


def test_metrics_are_records_where_pandas_is_not_installed(
    finished_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = loratune.open_result(finished_run.root)
    frame = result.metrics
    assert isinstance(frame, pd.DataFrame)
    monkeypatch.delitem(sys.modules, "pandas")
    monkeypatch.setattr("loratune.workflows.result.find_spec", lambda name: None)
    assert result.metrics == finished_run.read_metrics()
    assert len(result.metrics) == len(frame)


def test_open_result_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is not a run directory|no such"):
        loratune.open_result(tmp_path)
