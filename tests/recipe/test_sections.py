"""Every number refuses YAML's booleans, and every section says what contradicts in it."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from loratune.recipe.checks import check_data, check_once, check_train
from loratune.recipe.recipe import Recipe
from loratune.recipe.sections.base import Contradiction, Source, as_sources_or_setting
from loratune.recipe.sections.data import DataSection
from loratune.recipe.sections.evaluate import EvaluateSection
from loratune.recipe.sections.lora import VARIANTS, LoraSection
from loratune.recipe.sections.model import ModelSection
from loratune.recipe.sections.preference import PreferenceSection
from loratune.recipe.sections.train import DECAY_FRACTION, TrainSection
from loratune.recipe.tasks import TASKS
from loratune.run.errors import RecipeError

SECTIONS = {
    "model": ModelSection,
    "data": DataSection,
    "lora": LoraSection,
    "train": TrainSection,
    "preference": PreferenceSection,
    "evaluate": EvaluateSection,
}


OF_ONE_TASK = {name: section.only_for for name, section in SECTIONS.items() if section.only_for}
"""Section → the only task that has it."""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("section", OF_ONE_TASK)
def test_a_section_of_another_task_is_refused_also_with_its_defaults(section: str, task: str) -> None:
    field, info = next(iter(SECTIONS[section].model_fields.items()))
    values = {"model": {"task": task}, section: {field: info.default}}
    if task == OF_ONE_TASK[section]:
        assert section in Recipe.parse(values).model_dump()
        return
    with pytest.raises(RecipeError) as error:
        Recipe.parse(values, file="r.yaml", lines={f"{section}.{field}": 7})
    assert error.value.problem == f"{section}.{field} is {info.default}, which model.task {task} does not have"
    assert error.value.fix == f"task={OF_ONE_TASK[section]}, or leave {section} out"
    assert (error.value.file, error.value.line) == ("r.yaml", 7)
    with pytest.raises(RecipeError, match=f"{section}, which model.task {task} does not have"):
        Recipe(model={"task": task}, **{section: {}})


@pytest.mark.parametrize("task", TASKS)
def test_all_settings_of_a_recipe_make_the_same_recipe(task: str) -> None:
    recipe = Recipe.parse({"model": {"task": task}})
    everything = recipe.model_dump(mode="json")
    assert everything.keys() == SECTIONS.keys() - {name for name, only in OF_ONE_TASK.items() if only != task}
    assert Recipe.parse(everything) == recipe


def numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(numbers(part) for part in get_args(annotation))


NUMBERS = [
    f"{section}.{name}"
    for section, model in SECTIONS.items()
    for name, field in model.model_fields.items()
    if numbers(field.annotation)
]


def test_the_recipe_has_these_sections() -> None:
    assert {name: field.annotation for name, field in Recipe.model_fields.items()} == SECTIONS
    assert len(NUMBERS) >= 30


@pytest.mark.parametrize("name", NUMBERS)
def test_a_boolean_is_not_a_number(name: str) -> None:
    section, _, field = name.partition(".")
    annotation = SECTIONS[section].model_fields[field].annotation
    value = {"q_proj": True} if "_pattern" in field else [True] if field == "layers" else True
    if bool in get_args(annotation):
        pytest.fail(f"{name} takes a boolean and a number")
    with pytest.raises(RecipeError, match=rf"{section}\.{field}[\w.]* is .*(true|True)"):
        Recipe.parse({section: {field: value}})


def test_a_boolean_weight_of_a_source_is_refused_too() -> None:
    with pytest.raises(RecipeError, match=r"data\.train\.0\.weight is true: expected a number"):
        Recipe.parse({"data": {"train": [{"name": "a.jsonl", "weight": True}]}})


def test_whole_numbers_may_be_written_as_powers_of_ten() -> None:
    recipe = Recipe.parse({"evaluate": {"samples": 1e3}, "train": {"keep_checkpoints": 2.0}})
    assert (recipe.evaluate.samples, recipe.train.keep_checkpoints) == (1000, 2)
    with pytest.raises(RecipeError, match=r"train\.keep_checkpoints is 2\.5"):
        Recipe.parse({"train": {"keep_checkpoints": 2.5}})


def test_names_become_sources_and_settings_stay() -> None:
    assert as_sources_or_setting("none") == "none"
    assert as_sources_or_setting(0.1) == 0.1
    assert DataSection.model_validate({"eval": "a.jsonl"}).eval == (Source(name="a.jsonl"),)
    assert EvaluateSection.model_validate({"forgetting": ["a", {"name": "b"}]}).forgetting[1] == Source(name="b")
    assert "dora" in VARIANTS


def test_contradictions_carry_their_fix() -> None:
    with pytest.raises(Contradiction, match="named twice") as error:
        check_once("lora.targets", ("q_proj", "q_proj"))
    assert error.value.fix == "remove one of them"
    check_data(DataSection())
    check_train(TrainSection(), DECAY_FRACTION)
    early = TrainSection.model_construct(**{**TrainSection().model_dump(), "early_stopping": 2, "eval_every": "never"})
    with pytest.raises(Contradiction, match="so no held-out loss is measured"):
        check_train(early, DECAY_FRACTION)
