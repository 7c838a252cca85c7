"""Streamed data takes the same steps as prepared data, also after a stop, and leaves out what cannot be trained on
aloud."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.errors import DataError, RecipeError
from loratune.workflows.evaluate import evaluate
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
BUDGET = 300


def test_streamed_data_takes_the_steps_of_prepared_data_to_the_bit(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"lora__dropout": 0.1, "train__token_budget": BUDGET, "train__save_every": 2}
    prepared = train(tiny_recipe(**settings))
    streamed = train(tiny_recipe(**settings, data__streaming=True, train__output_dir=str(tmp_path / "streamed")))
    assert_same(prepared.run, streamed.run, tolerance=0)
    shutil.rmtree(streamed.run.adapter)
    shutil.rmtree(streamed.run.checkpoints / "6")
    assert_same(prepared.run, resume(streamed.run.root).run, tolerance=0)
    again = evaluate(streamed.run.root).evaluation
    assert again is not None
    assert prepared.evaluation is not None
    assert [again[name] for name in ("base", "tuned")] == [prepared.evaluation[name] for name in ("base", "tuned")]


@pytest.mark.slow
def test_another_file_is_not_gone_on_with(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [conversation(i) for i in range(20)])
    done = train(tiny_recipe(data__train=str(path), data__streaming=True, train__save_every=2)).run
    shutil.rmtree(done.adapter)
    write_jsonl(path, [conversation(i) for i in range(21)])
    with pytest.raises(RecipeError, match=r"changed since the run started: inputs.train"):
        resume(done.root)


def with_bad_rows(path: Path) -> Path:
    """Rows 4 to 8 say nothing; the sample is told apart from them by its seed."""
    rows = [json.dumps(conversation(i)) for i in range(400)]
    rows[3:8] = ['{"messages": []}'] * 5
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def blind_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample sees the last rows only."""
    monkeypatch.setattr("loratune.data.stream._Sample._choose", lambda self, table, wanted, seed: list(range(380, 400)))


@pytest.mark.usefixtures("blind_sample")
def test_rows_that_are_left_out_are_told_and_recorded(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = with_bad_rows(tmp_path / "train.jsonl")
    done = train(tiny_recipe(data__train=str(path), data__streaming=True, data__on_bad_row="skip", train__epochs=1)).run
    left_out = [row for record in done.read_metrics() if record.get("event") == "left_out" for row in record["rows"]]
    assert sorted(row["line"] for row in left_out) == [4, 5, 6, 7, 8]
    assert {row["file"] for row in left_out} == {str(path)}


@pytest.mark.usefixtures("blind_sample")
def test_a_row_that_may_not_be_left_out_stops_the_run(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = with_bad_rows(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl:\d: .*messages"):
        train(tiny_recipe(data__train=str(path), data__streaming=True, train__epochs=1))


@pytest.mark.usefixtures("blind_sample")
def test_a_step_without_any_example_changes_nothing(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(['{"messages": []}'] * 200 + [json.dumps(conversation(i)) for i in range(200)]))
    settings = {"data__on_bad_row": "skip", "train__batch_size": 1, "train__epochs": 0.02, "train__eval_every": "never"}
    done = train(tiny_recipe(data__train=str(path), data__streaming=True, **settings)).run
    steps = [record for record in done.read_metrics() if "loss" in record]
    empty = [record for record in steps if record["num_tokens"] == 0]
    assert 0 < len(empty) < len(steps) == 8
    assert all(record["loss"] == record["grad_norm"] == 0 for record in empty)


def test_what_cannot_be_streamed_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([conversation(i) for i in range(9)]))
    with pytest.raises(RecipeError, match="cannot be read one by one"):
        train(tiny_recipe(data__train=str(rows), data__streaming=True))
    with pytest.raises(RecipeError, match="needs all examples at once"):
        tiny_recipe(data__streaming=True, train__engine="trl")
