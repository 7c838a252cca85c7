from __future__ import annotations

from pathlib import Path

import pytest

from loratune.pipeline import train
from loratune.recipe import Recipe
from loratune.run import RunDir


@pytest.fixture(scope="session")
def finished_run(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run on the tiny model whose adapter changes every answer."""
    recipe = Recipe.parse(
        {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {"train": str(chat_files[0]), "eval": str(chat_files[1])},
            "lora": {"dropout": 0.0, "r": 4, "targets": "complete"},
            "train": {
                "output_dir": str(tmp_path_factory.mktemp("runs") / "tiny"),
                "epochs": 6,
                "learning_rate": 2e-2,
                "batch_size": 4,
                "device": "cpu",
                "save_every": "never",
                "eval_every": "never",
            },
            "evaluate": {"metric": "exact_match", "max_new_tokens": 6},
        }
    )
    return train(recipe).run
