"""The text of a recipe: numbers, lines, overrides, and what must not be in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratune.recipe.roles import as_written, roles_in_words, trained_roles
from loratune.recipe.validation_errors import ON_COMMAND_LINE, shown
from loratune.recipe.yaml import apply_override, hoist_task, read_yaml, refuse_secrets
from loratune.run.errors import RecipeError


def test_each_setting_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("task: sequence_classification\ntrain:\n  learning_rate: 1e-4\n  epochs: 2\n", encoding="utf-8")
    values, lines = read_yaml(path)
    assert values == {
        "model": {"task": "sequence_classification"},
        "train": {"learning_rate": 1e-4, "epochs": 2},
    }
    assert (lines["model.task"], lines["train.learning_rate"], lines["train.epochs"]) == (1, 3, 4)


def test_an_override_replaces_a_value_and_is_of_no_line() -> None:
    values: dict[str, Any] = {"train": {"epochs": 3}}
    lines = {"train": 1, "train.epochs": 2}
    apply_override(values, "train.epochs=0.5", lines)
    apply_override(values, "task=causal_lm", lines)
    assert values == {"train": {"epochs": 0.5}, "model": {"task": "causal_lm"}}
    assert lines["train.epochs"] == ON_COMMAND_LINE
    with pytest.raises(RecipeError, match="section train is 5, not a mapping"):
        apply_override({"train": 5}, "train.epochs=1", {})


def test_a_task_is_set_once() -> None:
    with pytest.raises(RecipeError, match=r"task and model\.task are the same setting"):
        hoist_task({"task": "causal_lm", "model": {"task": "causal_lm"}}, {"task": 4})


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 7)]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(RecipeError, match="aliases expand to more than 100,000 values"):
        read_yaml(path)


def test_a_secret_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the recipe contains a Hub token") as error:
        refuse_secrets("a: 1\n# hf_" + "a" * 30, tmp_path / "recipe.yaml")
    assert error.value.line == 2


def test_values_are_shown_as_yaml_has_them_and_never_endless() -> None:
    assert (shown(True), shown("a"), shown([1])) == ("true", "'a'", "[1]")
    assert len(shown("x" * 1000)) == 200
    assert "too large" in shown(10**5000)


def test_train_on_in_words() -> None:
    assert (trained_roles("last"), trained_roles("all"), trained_roles(("user",))) == (("assistant",), (), ("user",))
    assert as_written(("user", "tool")) == "[user, tool]"
    assert roles_in_words(["user", "tool"]) == "all messages of user and tool"
    assert roles_in_words("last") == "the last answer"
