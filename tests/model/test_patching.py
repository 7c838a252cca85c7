from __future__ import annotations

import pytest
import torch

from loratune.model.hub import explain_hub_errors
from loratune.model.patching import replace_class
from loratune.run.errors import MachineError, RecipeError


class Doubled(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name of torch
        return 2 * super().forward(input)


def test_one_object_computes_differently_and_keeps_its_parameters() -> None:
    layer, other, x = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), torch.randn(4, 3)
    before, weight, names = layer(x), layer.weight, list(layer.state_dict())
    replace_class(layer, Doubled)
    assert torch.equal(layer(x), 2 * before)
    assert layer.weight is weight
    assert list(layer.state_dict()) == names
    assert type(other) is torch.nn.Linear


def test_a_class_of_another_kind_is_refused() -> None:
    with pytest.raises(AssertionError, match="Linear is not a subclass of Embedding"):
        replace_class(torch.nn.Embedding(3, 2), torch.nn.Linear)


def test_an_unreachable_hub_is_an_error_of_the_machine() -> None:
    with (
        pytest.raises(
            MachineError, match=r"model\.name is a/b: the Hub cannot be reached, and the model is not in"
        ) as error,
        explain_hub_errors("model.name", "a/b", "model", fix="check the id", offline_fix="connect"),
    ):
        raise OSError("no route")
    assert error.value.fix == "connect"


def test_other_errors_pass() -> None:
    with (
        pytest.raises(RecipeError, match="no safetensors"),
        explain_hub_errors("model.name", "a/b", "model", fix="check the id", offline_fix="connect"),
    ):
        raise RecipeError("no safetensors")
