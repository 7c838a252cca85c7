from __future__ import annotations

import pytest
import torch

from loratune.model import device
from loratune.model.device import choose_device, choose_dtype


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [
        pytest.param(2.6, 1.0, "bfloat16", id="a processor with bfloat16 units"),
        pytest.param(0.4, 1.0, "float32", id="a processor that emulates bfloat16"),
        pytest.param(1.1, 1.0, "float32", id="a gain too small for the rounding"),
        pytest.param(1.3, 1.0, "bfloat16", id="a gain that is worth it"),
    ],
)
def test_a_cpu_gets_the_faster_type(
    monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float, chosen: str
) -> None:
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(device, "_matmul_seconds", seconds.__getitem__)
    choice = choose_dtype("auto", "cpu")
    assert choice.value == chosen
    assert f"{float32 / bfloat16:.1f} × as fast" in choice.reason


def test_the_user_s_choice_needs_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(device, "_matmul_seconds")
    assert choose_dtype("float16", "cpu") == device.Choice("float16")
    assert choose_device("cpu") == device.Choice("cpu")
