"""The E2E task of the LoRA paper: the shipped recipe on a file in E2E's format."""

from __future__ import annotations

import csv
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.errors import DataError
from loratune.workflows.evaluate import evaluate
from loratune.workflows.plan import plan
from loratune.workflows.train import train

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "e2e"


def meanings(name: str) -> Counter[str]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as stream:
        return Counter(row["mr"] for row in csv.DictReader(stream))


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(ROOT)
    return Recipe.load(
        "recipes/e2e.yaml",
        [
            *(
                f"model.name={tiny_model}",
                "model.dtype=float32",
                "train.device=cpu",
                f"train.output_dir={tmp_path / 'run'}",
            ),
            *("train.epochs=0.2", "evaluate.samples=5", "evaluate.max_new_tokens=8"),
        ],
    )


def test_the_script_writes_the_same_files_again(tmp_path: Path) -> None:
    script = tmp_path / "make_data.py"
    script.write_text((FOLDER / "make_data.py").read_text(encoding="utf-8"), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    for name in ("train.csv", "eval.csv"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_every_meaning_has_several_texts_and_none_is_on_both_sides() -> None:
    train_side, eval_side = meanings("train.csv"), meanings("eval.csv")
    assert set(eval_side.values()) == {4}
    assert set(train_side.values()) == {2}
    assert not train_side.keys() & eval_side.keys()


def test_the_recipe_runs_and_each_meaning_is_answered_once(recipe: Recipe) -> None:
    result = train(recipe)
    evaluation = json.loads(result.run.evaluation.read_text())
    assert len(evaluation["items"]) == 5
    assert all(len(item["references"]) == 4 for item in evaluation["items"])
    assert {item["line"] for item in evaluation["items"]} == {2, 6, 10, 14, 18}
    assert evaluation["num_examples"] == 64, "the loss is over every row"
    assert 0 <= evaluation["base"]["bleu"] <= 100
    assert result.run.report.is_file()
    again = evaluate(result.run.root).evaluation
    assert again is not None
    assert again["tuned"]["bleu"] == evaluation["tuned"]["bleu"]


def test_a_column_that_is_not_there_is_named_with_those_that_are(recipe: Recipe) -> None:
    data = recipe.data.model_copy(update={"columns": {"prompt": "meaning", "completion": "ref"}})
    with pytest.raises(DataError, match="from the column meaning, which no row has") as error:
        plan(recipe.model_copy(update={"data": data}))
    assert "fields mr, ref" in str(error.value)
