"""Adding a task takes a folder and a line in `recipe.tasks.TASKS`, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import loratune
from loratune.__main__ import app
from loratune.planning.task import planned_task
from loratune.recipe.recipe import Recipe
from loratune.recipe.tasks import TASKS
from loratune.run.directory import read_json
from loratune.run.errors import RecipeError
from loratune.workflows.evaluate import evaluate
from loratune.workflows.plan import plan
from loratune.workflows.resume import resume
from loratune.workflows.tasks.task import task_of
from loratune.workflows.train import train
from tests.workflows.tasks.doubling import MOST_TOKENS, DoubledLoss

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def third_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "doubling", "tests.workflows.tasks.doubling")  # the line in the table


def test_a_third_task_plans_trains_resumes_evaluates_and_reports(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(model__task="doubling", train__epochs=1)
    prepared = plan(recipe)
    assert prepared.as_plan()["data"]["doubled"] is True
    assert max(len(example.input_ids) for example in prepared.data.train) <= MOST_TOKENS
    assert prepared.choices["train.compile"].reason == "the tests are quicker without"
    result = train(recipe)
    assert read_json(result.run.lock)["inputs"]["doubling"] == "twice"
    assert result.evaluation is not None
    assert result.evaluation["tuned"]["nll"] < result.evaluation["base"]["nll"]
    assert result.run.report.is_file()
    with pytest.raises(RecipeError, match="finished"):
        resume(result.run.root)
    assert evaluate(result.run.root).evaluation == {**result.evaluation, "gates": []}
    shown = CliRunner().invoke(app, ["evaluate", str(result.run.root)])
    assert "doubled: " in shown.stdout, shown.output
    merged = CliRunner().invoke(app, ["merge", str(result.run.root), str(result.run.root.parent / "merged")])
    assert merged.exit_code == 0, merged.output


@pytest.mark.slow
def test_its_loss_is_the_one_that_training_uses(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.workflows.tasks.doubling.MOST_TOKENS", 10**6)  # both tasks train the same examples
    settings = {"train__epochs": 1, "data__train_on": "all", "lora__dropout": 0.0}
    first_losses = {}
    for task in ("doubling", "causal_lm"):
        recipe = tiny_recipe(model__task=task, train__output_dir=str(tmp_path / task), **settings)
        first_losses[task] = train(recipe).run.read_metrics()[0]["loss"]
    assert first_losses["doubling"] == pytest.approx(2 * first_losses["causal_lm"], rel=1e-5)


def test_what_it_refuses_is_refused_when_the_recipe_is_read(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="doubling does not have"):
        tiny_recipe(model__task="doubling", lora__variant="dora")
    with pytest.raises(RecipeError, match="Did you mean doubling"):
        tiny_recipe(model__task="dubling")


def test_the_schema_and_every_room_know_it(tiny_recipe: MakeRecipe) -> None:
    schema = json.dumps(Recipe.model_json_schema())
    assert '"doubling"' in schema
    recipe = tiny_recipe(model__task="doubling")
    assert task_of(recipe) is planned_task(recipe)
    assert isinstance(task_of(recipe).name, str)
    assert DoubledLoss.__mro__[1].__name__ == "SupervisedLoss"


def test_no_room_asks_which_task_it_is() -> None:
    """Tasks answer questions; code that compares a task's name is an `if` that the next task would need as well."""
    root = Path(loratune.__file__).parent
    asks = re.compile(r"is_classif|\btask(?:\.name)?\s*(?:==|!=)|== \"(?:causal_lm|sequence_classification)\"")
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        if "tasks" not in path.relative_to(root).parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if asks.search(line) and not line.lstrip().startswith(("for ", "#", "with "))
    ]
    assert found == []
