"""What `transformers serve` must find to serve base and adapter by name, and the command that starts it.

Its model names are what `from_pretrained` takes, so the models lie as folders `base` and NAME in the folder that it runs
in. The adapter's folder is the base once more with the adapter in it: transformers loads such a folder as base plus adapter.
What `/v1/models` lists is the hub cache, so it gets a cache of its own, which names the two and nothing else.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from loratune.exporting.merge_weights import copy_companions, weight_files
from loratune.run.errors import RecipeError

BASE_NAME = "base"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_REVISION = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """How a server is started.

    Attributes:
        words: The command.
        folder: Where it runs; None: where we are.
        environment: What is added to ours.
    """

    words: tuple[str, ...]
    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def served_name(name: str) -> str:
    """The model name of the adapter: the run's, as far as the hub's rules for names allow."""
    allowed = re.sub(r"[^A-Za-z0-9._-]+|-{2,}|\.{2,}", "-", name).strip("-.")[:96].strip("-.")
    return allowed if allowed not in ("", BASE_NAME) and not allowed.endswith(".git") else "tuned"


def check_transformers(config: Any) -> str:
    """The class that `transformers serve` loads this model by.

    Raises:
        RecipeError: It comes with code of its own.
    """
    name: str = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise RecipeError(
            f"transformers serve cannot load {name or 'a model that names no architecture'}: it takes transformers' own "
            "classes only",
            fix="install vLLM, or `loratune chat`",
        )
    return name


def model_folder(folder: Path, name: str) -> Path:
    """Where a served model lies."""
    return folder / "models" / name


def write_served(base: Path, adapter: Path, folder: Path, *, name: str, stop_token_ids: Sequence[int]) -> None:
    """Lay out base and adapter.

    Args:
        base: The base's folder; its weights are linked, not copied.
        adapter: The run's adapter folder, with tokenizer and template.
        folder: Where to; it is there.
        name: Of the adapter's model.
        stop_token_ids: What ends an answer.
    """
    for model in (BASE_NAME, name):
        place = model_folder(folder, model)
        place.mkdir(parents=True)
        index = base / "model.safetensors.index.json"
        shutil.copyfile(base / "config.json", place / "config.json")
        for file in [*weight_files(base), *([index.name] if index.is_file() else [])]:
            (place / file).symlink_to((base / file).resolve())
        copy_companions(base, adapter, place, stop_token_ids)
        _list_in_cache(folder / "hub", model, place / "config.json")
    for file in _ADAPTER_FILES:
        shutil.copyfile(adapter / file, model_folder(folder, name) / file)


def transformers_command(folder: Path, *, host: str, port: int, device: str, dtype: str) -> ServerCommand:
    """The command that serves what `write_served` wrote. Models stay loaded, and nothing is asked of the hub."""
    words = (sys.executable, "-P", "-m", "transformers.cli.transformers", "serve")
    options = ("--host", host, "--port", str(port), "--device", device, "--dtype", dtype, "--model-timeout=-1")
    return ServerCommand(
        words=(*words, *options),
        folder=folder / "models",
        environment={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")},
    )


def _list_in_cache(cache: Path, model: str, config: Path) -> None:
    """The least that lets `/v1/models` name a model: a revision with a configuration."""
    repository = cache / f"models--{model}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_REVISION, encoding="utf-8")
    snapshot = repository / "snapshots" / _REVISION
    snapshot.mkdir(parents=True)
    shutil.copyfile(config, snapshot / config.name)
