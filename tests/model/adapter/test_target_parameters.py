from __future__ import annotations

import pytest
import torch
from torch import nn

from loratune.model.adapter.module_roles import linear_modules
from loratune.model.adapter.target_parameters import resolve_target_parameters, target_parameters_in_words
from loratune.model.adapter.targets import Matrix
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 6, 5))
        self.gate = nn.Linear(5, 4)


def test_a_stack_of_experts_is_found_with_its_count_and_shape() -> None:
    model = nn.ModuleDict({"experts": Experts()})
    found = resolve_target_parameters(model, LoraSection(target_parameters=("experts.up",)))
    assert found == (Matrix(name="experts.up", d_in=5, d_out=6, count=4),)
    assert target_parameters_in_words(found) == "experts.up of 4 experts in 1 layers"
    assert list(linear_modules(model)) == ["experts.gate"]


@pytest.mark.parametrize(
    ("name", "problem", "fix"),
    [
        ("experts.down", "matches no parameter", "known here: experts.up"),
        ("gate.weight", "is the weight of a Linear", "lora.targets=[experts.gate]"),
        ("gate.bias", "is the weight of a Linear", "lora.targets=[experts.gate]"),
    ],
)
def test_what_peft_cannot_adapt_is_refused(name: str, problem: str, fix: str) -> None:
    model = nn.ModuleDict({"experts": Experts()})
    with pytest.raises(RecipeError, match=problem) as error:
        resolve_target_parameters(model, LoraSection(target_parameters=(name,)))
    assert error.value.fix == fix
