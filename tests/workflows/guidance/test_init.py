from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from loratune.recipe.recipe import Recipe
from loratune.recipe.yaml import read_yaml
from loratune.run.errors import DataError, RecipeError
from loratune.workflows.guidance.init import init, starter_for_data
from loratune.workflows.guidance.shipped import shipped_recipes
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
    assert recipe.data.eval == 0.2


@pytest.mark.parametrize(
    ("number", "held_out"),
    [(20, 4), (40, 8), (50, 10), (60, 10), (73, 10), (150, 11), (199, 12), (200, 10), (1000, 50)],
)
def test_enough_is_held_out_for_the_answers_of_the_report(number: int, held_out: int, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", [conversation(i) for i in range(number)])
    starter = starter_for_data(str(data))
    share, reason = starter.settings["data.eval"]
    assert round(share * number) == held_out
    assert reason == f"about one conversation in {round(1 / share)} is held out"
    assert starter.settings["train.batch_size"][1] == f"{-(-(number - held_out) // 8)} steps per epoch"


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
    assert starter.settings["train.batch_size"] == (32, "60 steps per epoch"), "100 rows are held out"


LABELLED = {
    "text and label": lambda i: {"text": f"words {i}", "label": ("no", "yes")[i % 2]},
    "sentence1, sentence2 and label": lambda i: {"sentence1": f"a {i}", "sentence2": "b", "label": i % 3},
}


@pytest.mark.parametrize("form", LABELLED)
def test_labeled_rows_make_a_recipe_of_a_classifier(form: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", [*map(LABELLED[form], range(30)), {"text": "words", "label": None}])
    path, starter = init(str(data), None)
    recipe = Recipe.load(path)
    assert recipe.model.task == "sequence_classification"
    assert (recipe.data.train_on, recipe.data.on_bad_row, recipe.data.eval) == ("assistant", "skip", 0.2)
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
    path, _ = init(name, "my own.yaml")
    assert Recipe.load(path) == Recipe.load(shipped_recipes()[name])
    text, shipped = path.read_text(encoding="utf-8"), shipped_recipes()[name].read_text(encoding="utf-8")
    assert shipped.splitlines()[0] in text, "what is known about the recipe comes along"
    assert "recipes/" not in text
    assert ("'my own.yaml'" in text) == (f"recipes/{name}.yaml" in shipped)


def test_the_file_has_the_name_of_the_recipe() -> None:
    assert init("qwen2.5-7b")[0] == Path("qwen2.5-7b.yaml"), "a dot in a recipe's name begins no suffix"


def test_nothing_is_overwritten_without_being_asked() -> None:
    Path("chat.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="already exists"):
        init("chat", None)
    assert Path("chat.yaml").read_text() == "mine"
    init("chat", None, overwrite=True)
    assert Recipe.load("chat.yaml").lora.targets == "complete"


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_with_usual_columns_is_read_as_it_is(mark: str, encoding: str, tmp_path: Path) -> None:
    answer = "Für vieles, für das man Zahlen braucht, und für mehr."
    data = tmp_path / "my faq.csv"
    with data.open("w", encoding=encoding, newline="") as stream:
        table = csv.writer(stream, delimiter=mark)
        table.writerow(["Frage", "Antwort"])
        table.writerows([f"Wofür ist {n}?", answer] for n in range(30))
    path, starter = init(str(data))
    recipe = Recipe.load(path)
    assert recipe.data.columns == {"prompt": "Frage", "completion": "Antwort"}
    assert recipe.train.output_dir == "__models/my faq", "named after the data, not the model"
    assert starter.settings["train.batch_size"][1] == "3 steps per epoch", "six of 30 are held out"
    assert recipe.evaluate.metric == "none"
    assert recipe.evaluate.max_new_tokens == 32


def test_unusual_columns_are_named_asked_for_or_told_how_to_name(tmp_path: Path) -> None:
    data = tmp_path / "t.csv"
    data.write_text("left,right\n" + "".join(f"l{n},r{n}\n" for n in range(30)))
    with pytest.raises(DataError, match="columns left, right have no usual names") as told:
        init(str(data))
    command, _, comment = told.value.fix.partition("  # ")
    assert command == f"loratune init {data} --columns prompt=COLUMN,completion=COLUMN"
    assert "add a header line at the top" in comment
    found, _ = init(str(data), columns={"prompt": "left", "completion": "right"})
    asked: list[list[str]] = []
    again, _ = init(
        str(data), "again.yaml", ask=lambda names: asked.append(names) or {"prompt": "left", "completion": "right"}
    )
    assert asked == [["left", "right"]]
    assert Recipe.load(found).data == Recipe.load(again).data
    with pytest.raises(DataError, match="reads prompt from the column top"):
        init(str(data), columns={"prompt": "top"}, overwrite=True)


@pytest.mark.parametrize("name", [*sorted(shipped_recipes()), *ROWS])
def test_editors_accept_what_is_written(name: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", [ROWS[name](i) for i in range(30)]) if name in ROWS else name
    path, _ = init(str(data))
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    schema = json.loads(path.with_name(first.rpartition("$schema=")[2]).read_text(encoding="utf-8"))
    written = json.loads(json.dumps(read_yaml(path)[0]))
    Draft202012Validator(schema).validate(written)
    written["train"]["epoch"] = 1
    assert not Draft202012Validator(schema).is_valid(written)


def test_a_name_that_is_neither_recipe_nor_data_is_refused() -> None:
    with pytest.raises(RecipeError, match="neither a recipe nor a data file") as error:
        init("quikstart", None)
    assert "quickstart" in error.value.fix
