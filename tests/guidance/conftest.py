"""A recipe file on the tiny model, as a user would write it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def recipe_file(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model:\n  name: {tiny_model}\n  dtype: float32\n"
        f"data:\n  train: {chat_files[0]}\n  eval: {chat_files[1]}\n"
        "lora: {r: 4, dropout: 0.1}\n"
        f"train:\n  output_dir: {tmp_path / 'run'}\n  device: cpu\n  learning_rate: 1e-2\n  log_every: 1\n"
        "  epochs: 1.5\n  schedule: cosine\n  warmup_fraction: 0.3\n"
    )
    return path
