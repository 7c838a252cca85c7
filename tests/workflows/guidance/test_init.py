from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.errors import DataError, RecipeError
from loratune.workflows.guidance.init import init, shipped_recipes, starter_for_data
from tests.conftest import conversation, write_jsonl

ROWS = {
    "messages": conversation,
    "sharegpt": lambda i: {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": lambda i: {"prompt": f"q{i}", "completion": "a"},
    "alpaca": lambda i: {"instruction": f"q{i}", "input": "", "output": "a"},
    "text": lambda i: {"text": f"words {i}"},
}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("form", ROWS)
def test_the_format_is_detected_and_the_recipe_can_be_read(form: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", [ROWS[form](i) for i in range(30)])
    path, _ = init(str(data), None)
    assert path == Path("mine.yaml")
    recipe = Recipe.load(path)
    assert recipe.data.format == form
    assert recipe.data.train[0].name == str(data)
    assert recipe.data.train_on == ("all" if form == "text" else "assistant")
    assert recipe.data.eval == 0.05


def test_every_setting_is_below_its_docstring(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", [conversation(i) for i in range(30)])
    path, starter = init(str(data), None)
    text = path.read_text()
    comments = " ".join(line.strip().removeprefix("# ") for line in text.splitlines() if line.strip().startswith("#"))
    for name in starter.settings:
        section, _, field = name.partition(".")
        words = Recipe.model_fields[section].annotation.model_fields[field].description  # type: ignore[union-attr]
        assert " ".join(words.split()) in comments
    assert max(map(len, text.splitlines())) <= 120
    assert "the format of all 30 rows" in comments


def test_json_answers_are_scored_as_json_and_few_rows_are_all_trained(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": json.dumps({"n": i})} for i in range(30)]
    many = starter_for_data(str(write_jsonl(tmp_path / "many.jsonl", rows)))
    assert many.settings["evaluate.metric"][0] == "json"
    few = starter_for_data(str(write_jsonl(tmp_path / "few.jsonl", rows[:5])))
    assert few.settings["data.eval"][0] == "none"
    assert "evaluate.metric" not in few.settings


def test_rows_that_cannot_be_trained_on_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [*(conversation(i) for i in range(30)), {"messages": [{"role": "king", "content": "x"}]}]
    starter = starter_for_data(str(write_jsonl(tmp_path / "mine.jsonl", rows)))
    value, reason = starter.settings["data.on_bad_row"]
    assert value == "skip"
    assert reason.startswith("1 row cannot")
    with pytest.raises(DataError, match="none of 1 row "):
        starter_for_data(str(write_jsonl(tmp_path / "bad.jsonl", rows[-1:])))


def test_large_data_gets_larger_steps(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(2000)]
    starter = starter_for_data(str(write_jsonl(tmp_path / "large.jsonl", rows)))
    assert starter.settings["train.batch_size"] == (32, "63 steps per epoch")


LABELLED = {
    "text and label": lambda i: {"text": f"words {i}", "label": ("no", "yes")[i % 2]},
    "sentence1, sentence2 and label": lambda i: {"sentence1": f"a {i}", "sentence2": "b", "label": i % 3},
}


@pytest.mark.parametrize("form", LABELLED)
def test_labelled_rows_make_a_recipe_of_a_classifier(form: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", [*map(LABELLED[form], range(30)), {"text": "words", "label": None}])
    path, starter = init(str(data), None)
    recipe = Recipe.load(path)
    assert recipe.model.task == "sequence_classification"
    assert (recipe.data.train_on, recipe.data.on_bad_row, recipe.data.eval) == ("assistant", "skip", 0.05)
    number = 3 if "sentence1" in form else 2
    assert starter.settings["model.task"][1] == f"the rows have {form}, with {number} classes"
    assert "1 row cannot be trained on" in path.read_text()


def test_texts_whose_labels_never_come_again_are_texts(tmp_path: Path) -> None:
    rows = [{"text": f"words {i}", "label": f"title {i}"} for i in range(30)]
    starter = starter_for_data(str(write_jsonl(tmp_path / "mine.jsonl", rows)))
    assert starter.settings["data.format"][0] == "text"
    assert "model.task" not in starter.settings


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_keeps_its_settings(name: str) -> None:
    path, _ = init(name, None)
    assert Recipe.load(path) == Recipe.load(shipped_recipes()[name])


def test_nothing_is_overwritten_without_being_asked() -> None:
    Path("chat.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="already exists"):
        init("chat", None)
    assert Path("chat.yaml").read_text() == "mine"
    init("chat", None, overwrite=True)
    assert Recipe.load("chat.yaml").lora.targets == "complete"


def test_a_name_that_is_neither_recipe_nor_data_is_refused() -> None:
    with pytest.raises(RecipeError, match="neither a recipe nor a data file") as error:
        init("quikstart", None)
    assert "quickstart" in error.value.fix
