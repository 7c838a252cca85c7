from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from loratune.recipe.recipe import Recipe, Section
from loratune.run.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(path, overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    assert load(tmp_path, recipe.to_yaml()) == recipe


def test_the_defaults_are_those_of_the_seed_but_for_the_trained_tokens() -> None:
    recipe, seed = Recipe(), Recipe.load(next(path for path in RECIPES if path.stem == "seed"))
    assert seed.data.train_on == "all"
    assert recipe.data.train_on == "assistant"
    assert recipe.model == seed.model
    assert recipe.lora == seed.lora
    assert recipe.data.train == seed.data.train
    assert recipe.train.model_copy(update={"output_dir": seed.train.output_dir}) == seed.train
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.targets) == (16, 32, 0.05, "balanced")
    assert (recipe.train.learning_rate, recipe.train.epochs, recipe.train.batch_size) == (5e-5, 3, 8)


def test_every_field_is_described_for_people() -> None:
    sections = [field.annotation for field in Recipe.model_fields.values()]
    for section in sections:
        assert isinstance(section, type)
        assert issubclass(section, Section)
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no docstring"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "1e-04"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"train:\n  learning_rate: {text}\n").train.learning_rate == 1e-4


def test_settings_on_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, "lora:\n  r: 8\n", "lora.r=32", "lora.targets=[q_proj, up_proj]", "train.eval_every=0.25")
    assert (recipe.lora.r, recipe.lora.targets, recipe.train.eval_every) == (32, ("q_proj", "up_proj"), 0.25)


def test_a_source_may_be_a_name_or_a_mapping_or_a_list(tmp_path: Path) -> None:
    recipe = load(tmp_path, "data:\n  train: [a.jsonl, {name: b.jsonl, weight: 2}]\n  eval: 0.1\n")
    assert [(source.name, source.weight) for source in recipe.data.train] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]
    assert recipe.data.eval == 0.1


@pytest.mark.parametrize(
    ("text", "overrides", "line", "words"),
    [
        ("train:\n  learningrate: 1e-4\n", (), 2, ["unknown setting train.learningrate", "did you mean learning_rate"]),
        ("trian:\n  epochs: 1\n", (), 1, ["unknown setting trian", "did you mean train"]),
        ("train:\n  epochs: three\n", (), 2, ["train.epochs is 'three'", "valid number"]),
        ("data:\n  train: {nam: x}\n", (), 2, ["data.train"]),
        ("lora:\n  targets: full\n", (), 2, ["lora.targets is 'full'", "balanced"]),
        ("lora:\n  r: 0\n", (), 2, ["lora.r is 0", "greater than or equal to 1"]),
        ("data:\n  max_length: 1\n", (), None, ["max_length is 1"]),
        ("data:\n  eval: 1.5\n", (), None, ["eval is 1.5", "between 0 and 1"]),
        ("data:\n  format: text\n", (), None, ["format is text", "train_on: all"]),
        (
            "data:\n  eval: none\nevaluate:\n  metric: json\n",
            (),
            None,
            ["evaluate.metric is json", "data.eval is none"],
        ),
        ("train:\n  epochs: 1\n  epochs: 2\n", (), 3, ["train.epochs is set twice"]),
        ("train: 5\n", (), 1, ["train is 5"]),
        ("- a\n", (), None, ["a list"]),
        ("train:\n epochs: [\n", (), 3, ["not YAML", "check indentation and colons"]),
        ("train:\n\tepochs: 3\n", (), 2, ["not YAML", "spaces instead of tabs"]),
        ("only words\n", (), None, ["mapping of sections", "`loratune init` writes one"]),
        ("", ("epochs=1",), None, ["'epochs=1' is not a setting"]),
        ("", ("train.epochs",), None, ["section.field=value"]),
        ("", ("train.save_every=1.5",), None, ["save_every is 1.5"]),
        ("", ("train.schedule=inverse_sqrt",), None, ["schedule is inverse_sqrt", "warmup_fraction is 0"]),
        (
            "train:\n  schedule: warmup_stable_decay\n  warmup_fraction: 0.9\n",
            (),
            None,
            ["last 20% of the steps", "warmup_fraction is 0.9", "overlap"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_its_fix(
    tmp_path: Path, text: str, overrides: tuple[str, ...], line: int | None, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, text, *overrides)
    for word in words:
        assert word in str(error.value)
    if line is not None:
        assert error.value.line == line
    assert error.value.exit_code == 2


WRONG = {
    "lora.rank_pattern={'*q_proj': 3}": [
        "lora.rank_pattern: *q_proj is not a regular expression: nothing to repeat",
        "q_proj",
    ],
    "lora.rank_pattern={q_proj: 0}": ["lora.rank_pattern.q_proj is 0", "greater than or equal to 1"],
    "lora.rank_pattern={q_proj: yes}": ["lora.rank_pattern.q_proj is true: expected a number"],
    "train.learning_rate_pattern={'[': 1}": ["train.learning_rate_pattern: [ is not a regular expression"],
    "train.optimizer=adamW": ["train.optimizer is 'adamW'", "Did you mean adamw?"],
    "lora.variant=dorra": ["lora.variant is 'dorra'", "Did you mean dora?"],
    "task=classification": ["model.task is 'classification'", "Did you mean sequence_classification?"],
    "train.early_stopping=yes": ["train.early_stopping is true: expected a number"],
    "train.early_stopping=2": ["train.early_stopping is 2, but data.eval is none", "data.eval=0.1"],
    "train.average_checkpoints=1": ["train.average_checkpoints is 1", "greater than or equal to 2"],
    "lora.new_tokens=[<|a|>, <|a|>]": ["lora.new_tokens: <|a|> is named twice", "remove one of them"],
    "lora.modules_to_save=[norm, norm]": ["lora.modules_to_save: norm is named twice"],
    "lora.target_parameters=[a.b, a.b]": ["lora.target_parameters: a.b is named twice"],
    "lora.targets=[q_proj, q_proj]": ["lora.targets: q_proj is named twice"],
    "lora.layers=[0, 0]": ["lora.layers: 0 is named twice"],
    "lora.modules_to_save=['']": ["lora.modules_to_save is ''", "at least 1 character"],
    "lora.modules_to_save=lm_head": ["lora.modules_to_save is 'lm_head': Input should be a list", "[lm_head]"],
    "train.report_to=[wandb, wandb]": ["train.report_to: wandb is named twice"],
    "data.train=[{name: a.jsonl, weight: 0}]": ["data.train.0.weight is 0", "How many times each row"],
    "evaluate.metric=json": ["evaluate.metric is json, but data.eval is none", "data.eval=0.1"],
}


@pytest.mark.parametrize("setting", WRONG)
def test_every_wrong_setting_is_told_with_its_name_its_value_its_line_and_a_fix(tmp_path: Path, setting: str) -> None:
    name, _, value = setting.partition("=")
    section, _, field = name.rpartition(".")
    lines = {"data": ["eval: none"], section: [f"{field}: {value}"]} if section else {}
    lines["data"] = [*dict.fromkeys([*lines.get("data", []), "eval: none"])]
    text = "".join(f"{part}:\n" + "".join(f"  {line}\n" for line in own) for part, own in lines.items())
    text = text if section else f"{field}: {value}\n{text}"
    with pytest.raises(RecipeError) as error:
        load(tmp_path, text)
    for words in WRONG[setting]:
        assert words in str(error.value)
    assert error.value.line == 1 + text.splitlines().index(f"{'  ' * bool(section)}{field}: {value}")
    assert error.value.fix


def test_a_missing_recipe_and_a_binary_one_are_recipe_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe\n  fix: check the path; `loratune init` writes a recipe"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["my faq.csv", "a.JSONL", "a.parquet"])
def test_data_in_place_of_a_recipe_is_answered_with_the_command_for_data(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("question,answer\nWhen: now?,Yes\n")
    with pytest.raises(RecipeError, match="this is data, not a recipe") as error:
        Recipe.load(tmp_path / name)
    command, _, comment = error.value.fix.partition("  # ")
    assert shlex.split(command) == ["loratune", "init", str(tmp_path / name)]
    assert comment


def test_the_schema_names_every_setting() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "learning_rate" in schema["$defs"]["TrainSection"]["properties"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("layers", ["last", "first 0", "last -1", "0", "middle 2"])
def test_layers_are_all_or_counted_from_an_end(layers: str) -> None:
    with pytest.raises(RecipeError, match=rf"lora\.layers is {layers}\n  fix: use all"):
        Recipe.parse({"lora": {"layers": layers}})


def test_settings_are_replaced_with_the_checks_of_a_file() -> None:
    recipe = Recipe.parse({"train": {"epochs": 2, "seed": 7}, "model": {"name": "a"}})
    other = recipe.replace(train={"epochs": 1}, lora={"r": 8})
    assert (other.train.epochs, other.train.seed, other.lora.r, other.model.name) == (1, 7, 8, "a")
    assert recipe.train.epochs == 2
    with pytest.raises(RecipeError, match=r"unknown setting train\.lr"):
        recipe.replace(train={"lr": 1})


@pytest.mark.parametrize(("value", "fix"), [("three", "train.epochs=3, the default"), (-1, "train.epochs=3")])
def test_the_fix_of_a_wrong_value_shows_a_right_one(value: object, fix: str) -> None:
    with pytest.raises(RecipeError) as told:
        Recipe.parse({"train": {"epochs": value}})
    assert f"For example {fix}" in told.value.fix
