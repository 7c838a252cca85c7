"""Roles in `train_on` go the whole way: both engines, and everything that a run says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loratune.recipe.recipe import Recipe
from loratune.run.directory import read_json
from loratune.workflows.train import train
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]


def test_engines_take_the_same_steps_and_all_pages_say_what_carries_loss(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = {"data__train_on": ["user", "assistant"], "train__epochs": 1}
    fast = train(tiny_recipe(**settings)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    assert "all messages of user and assistant" in fast.report.read_text()
    assert "`train_on: [user, assistant]`" in (fast.adapter / "README.md").read_text()
    plan, data = read_json(fast.plan)["data"], read_json(fast.data)
    assert data["train"]["trained_messages"] == {"user": 27, "assistant": 27}
    assert data["train"]["supervised_tokens"] == plan["num_supervised_tokens"]
    pieces = [piece for example in read_json(fast.preview)["examples"] for piece in example["pieces"]]
    assert any(piece["trained"] and "Describe thing" in piece["text"] for piece in pieces)
    assert not any(piece["trained"] and "You are a helpful" in piece["text"] for piece in pieces)
