"""The settings of another tool's file, looked up by their names there."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.workflows.guidance.other_tools.rules import answers_to, is_a_word
from loratune.workflows.guidance.other_tools.settings import OtherSettings, Translated


def settings(**named: object) -> OtherSettings:
    values = {name.replace("__", "."): value for name, value in named.items()}
    return OtherSettings(path=Path("a.yaml"), named=values, lines={"peft": 3, "peft.r": 4, "datasets": 7})


def test_a_setting_is_found_in_any_mapping_but_those_of_datasets() -> None:
    file = settings(peft__r=8, datasets__0__name="x", rank=4)
    assert file.find("r") == ("peft.r", 8)
    assert file.first("name") is None
    assert file.first("lora_rank", "rank", "r") == 4


@pytest.mark.parametrize(
    ("name", "tool"),
    [("micro_batch_size", "Axolotl"), ("cutoff_len", "LLaMA-Factory"), ("iters", "mlx-lm"), ("max_steps", "TRL")],
)
def test_a_tool_is_known_by_its_settings(name: str, tool: str) -> None:
    assert settings(**{name: 1}).tool == tool


def test_an_error_has_the_line_of_the_setting_or_of_what_it_is_in() -> None:
    file = settings()
    assert [file.error(name, "p", "f").line for name in ("peft.r", "peft.x", "datasets.0.path", "y")] == [4, 3, 7, None]


def test_a_part_shows_its_value_as_yaml_has_it() -> None:
    assert [str(Translated(name="a", value=value, answer="")) for value in (None, True, "x")] == [
        "a: null",
        "a: true",
        "a: 'x'",
    ]


def test_which_settings_are_one_word() -> None:
    assert all(map(is_a_word, ("lora_r", "peft.lora_alpha", "bf16", "warmup_steps")))
    assert not any(map(is_a_word, ("target_modules", "packing", "unheard_of", "lr_schedule.arguments")))
    assert answers_to("lr_schedule.arguments", [0.1], settings()) == [{"train.learning_rate": 0.1}]
