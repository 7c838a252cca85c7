"""A recipe file on the tiny model, as a user would write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import conversation, write_jsonl


@pytest.fixture(scope="session")
def few_chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight training conversations and two held-out ones."""
    folder = tmp_path_factory.mktemp("few")
    return (
        write_jsonl(folder / "train.jsonl", [conversation(i) for i in range(8)]),
        write_jsonl(folder / "eval.jsonl", [conversation(i) for i in range(100, 102)]),
    )


@pytest.fixture
def recipe_file(tiny_model: Path, few_chats: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model:\n  name: {tiny_model}\n  dtype: float32\n"
        f"data:\n  train: {few_chats[0]}\n  eval: {few_chats[1]}\n"
        "lora: {r: 4, dropout: 0.1}\n"
        f"train:\n  output_dir: {tmp_path / 'run'}\n  device: cpu\n  learning_rate: 1e-2\n  log_every: 1\n"
        "  epochs: 1.5\n  batch_size: 4\n  schedule: cosine\n  warmup_fraction: 0.3\n"
    )
    return path
