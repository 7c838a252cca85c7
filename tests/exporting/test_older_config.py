"""Rotary positions under the names of transformers 4, which other programs still read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from loratune.exporting.older_config import add_older_names, lacks_older_names, with_older_names

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("rope", "older"),
    [
        ({"rope_theta": 1e5, "rope_type": "default"}, {"rope_theta": 1e5}),
        ({"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, {}),
        (None, {}),
    ],
)
def test_older_names_are_added(rope: dict[str, Any] | None, older: dict[str, Any]) -> None:
    config = {"rope_parameters": rope, "hidden_size": 8}
    assert with_older_names(config) == {**config, **older}


def test_names_that_are_there_are_kept_and_nested_ones_added() -> None:
    config = {
        "rope_parameters": {"rope_theta": 5.0},
        "rope_theta": 7.0,
        "text_config": {"rope_parameters": {"rope_theta": 3.0}},
    }
    both = with_older_names(config)
    assert both["rope_theta"] == 7.0
    assert both["text_config"]["rope_theta"] == 3.0


def test_transformers_reads_the_same_from_both(tmp_path: Path) -> None:
    config = LlamaConfig(rope_parameters={"rope_theta": 5e5, **LLAMA3}, max_position_embeddings=16384)
    config.save_pretrained(tmp_path)
    assert lacks_older_names(tmp_path)
    add_older_names(tmp_path)
    assert not lacks_older_names(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] == LLAMA3
    assert LlamaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
