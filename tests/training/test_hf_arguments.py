from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.training.hf_arguments import TrainingData, training_arguments

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("optimizer", "device", "name"),
    [
        ("adamw", "cuda", "adamw_torch_fused"),
        ("adamw", "cpu", "adamw_torch"),
        ("lion", "cuda", "lion_32bit"),
        ("sgd", "cpu", "sgd"),
    ],
)
def test_adamw_updates_all_parameters_of_a_gpu_in_one_launch(
    optimizer: str, device: str, name: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe: Recipe = tiny_recipe(train__optimizer=optimizer)
    train = recipe.train.model_copy(update={"device": device})
    data = TrainingData(train=[], known=[], eval=[], token_budget=1)
    assert training_arguments(train, data, RunDir(tmp_path))["optim"] == name


def test_the_fused_optimizer_takes_the_steps_of_the_plain_one() -> None:
    """On a CPU, which has both."""
    torch.manual_seed(0)
    start = [torch.randn(16, 40), torch.randn(40, 16)]
    gradients = [[torch.randn_like(weight) for weight in start] for _ in range(5)]
    results = []
    for settings in ({"fused": True}, {}):
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, **settings)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        results.append(weights)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
