"""Groups with their own learning rate, and the arguments that make a schedule."""

from __future__ import annotations

import pytest
import torch

from loratune.model.adapter.attach import attach_adapter, trainable_parameters
from loratune.model.adapter.targets import resolve_targets
from loratune.recipe.recipe import LoraSection, TrainSection
from loratune.training.hf_arguments import schedule_arguments
from loratune.training.param_groups import apply_learning_rate_pattern, scale_b_learning_rate
from tests.model.adapter.test_attach import tiny


def rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, float]:
    of = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    return {name: of[id(weight)] for name, weight in trainable_parameters(model).items()}


@pytest.fixture
def model() -> torch.nn.Module:
    base = tiny()
    return attach_adapter(base, LoraSection(), resolve_targets(base, "balanced"), base_name="tiny", seed=0)


def test_lora_plus_scales_the_rate_of_b_alone(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1)
    scale_b_learning_rate(optimizer, model, 16)
    found = rates(optimizer, model)
    assert [rate for name, rate in found.items() if ".lora_B." in name] == pytest.approx([1.6] * (len(found) // 2))
    assert {rate for name, rate in found.items() if ".lora_A." in name} == {0.1}
    assert optimizer.param_groups[0]["lr"] == 0.1, "the first group's rate is logged"


def test_a_pattern_sets_the_rate_that_lora_plus_then_scales(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1)
    apply_learning_rate_pattern(optimizer, model, {"layers.0.self_attn.q_proj": 0.01})
    scale_b_learning_rate(optimizer, model, 2)
    for name, rate in rates(optimizer, model).items():
        expected = (0.01 if "layers.0.self_attn.q_proj" in name else 0.1) * (2 if ".lora_B." in name else 1)
        assert rate == pytest.approx(expected), name


def test_warm_up_and_decay_are_rounded_up_to_whole_steps() -> None:
    train = TrainSection(schedule="warmup_stable_decay", warmup_fraction=0.05)
    arguments = schedule_arguments(train, 30)
    assert arguments["warmup_steps"] == 2
    assert arguments["lr_scheduler_kwargs"]["num_decay_steps"] == 6
    constant = schedule_arguments(TrainSection(schedule="constant", warmup_fraction=0.1), 10)
    assert constant["lr_scheduler_type"] == "constant_with_warmup"
