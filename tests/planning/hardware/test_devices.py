from __future__ import annotations

import pytest

from loratune.planning.hardware.devices import DEVICES, find_device
from loratune.run.errors import RecipeError


def test_every_device_has_plausible_figures_and_a_source() -> None:
    for name, device in DEVICES.items():
        assert name == device.name == name.lower()
        assert 16e9 <= device.memory_bytes <= 300e9
        assert 50e12 <= device.bf16_flops_per_second <= 5e15
        assert device.source


def test_a_name_is_found_in_any_spelling() -> None:
    assert find_device("H100 80GB") is find_device("h100_80gb") is DEVICES["h100-80gb"]


def test_the_message_about_an_unknown_device_names_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match="unknown --device rtx4091") as error:
        find_device("rtx4091")
    assert "did you mean rtx4090" in error.value.fix
