"""The folder from which `transformers serve` serves base and fine-tuned model by name, and the command that starts it.

Model names are what `from_pretrained` takes, so the models are the folders `base` and NAME in the server's working
directory. The second one holds the base's files again and the adapter's: transformers loads such a folder as base plus
adapter. `/v1/models` lists the Hub cache, so the server gets its own cache, which names these two models only.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import transformers

from loratune.exporting.merge_weights import copy_companions, weight_files
from loratune.model.safetensors_headers import weight_index_of
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BASE_NAME = "base"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_REVISION = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """A command that starts a server.

    Attributes:
        words: The program and its arguments.
        folder: The server's working directory; None for ours.
        environment: The variables to add to our environment.
    """

    words: tuple[str, ...]
    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def served_name(name: str) -> str:
    """Return the fine-tuned model's name: the run's, restricted to what the Hub allows in names."""
    allowed = re.sub(r"[^A-Za-z0-9._-]+|-{2,}|\.{2,}", "-", name).strip("-.")[:96].strip("-.")
    return allowed if allowed not in ("", BASE_NAME) and not allowed.endswith(".git") else "tuned"


def check_transformers(config: Any) -> str:
    """Return the transformers class that `transformers serve` loads this model with.

    Raises:
        RecipeError: transformers has no such class; the model comes with its own code.
    """
    name: str = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise RecipeError(
            f"transformers serve cannot load {name or 'a model without a named architecture'}: "
            "it loads transformers' own classes only",
            fix="install vLLM, or `loratune chat`",
        )
    return name


def model_folder(folder: Path, name: str) -> Path:
    """Return the folder of a served model."""
    return folder / "models" / name


def write_served(base: Path, adapter: Path, folder: Path, *, name: str, stop_token_ids: Sequence[int]) -> None:
    """Write the folders of base and fine-tuned model.

    Args:
        base: The base's folder; its weights are linked, not copied. It may be in `folder`, which may then be renamed.
        adapter: The run's adapter folder, with tokenizer and template.
        folder: An existing folder to write into.
        name: The fine-tuned model's name.
        stop_token_ids: The tokens that end an answer.
    """
    for model in (BASE_NAME, name):
        target = model_folder(folder, model)
        target.mkdir(parents=True)
        index = weight_index_of(base)
        shutil.copyfile(base / "config.json", target / "config.json")
        for file in [*weight_files(base), *([] if index is None else [index.name])]:
            inside = base.is_relative_to(folder)
            (target / file).symlink_to(os.path.relpath(base / file, target) if inside else (base / file).resolve())
        copy_companions(base, adapter, target, stop_token_ids)
        _list_in_cache(folder / "hub", model, target / "config.json")
    for file in _ADAPTER_FILES:
        shutil.copyfile(adapter / file, model_folder(folder, name) / file)


def transformers_command(folder: Path, *, host: str, port: int, device: str, dtype: str) -> ServerCommand:
    """Return the command that serves the folder of `write_served`. Models stay loaded; the Hub is not contacted."""
    words = (sys.executable, "-P", "-m", "transformers.cli.transformers", "serve")
    options = ("--host", host, "--port", str(port), "--device", device, "--dtype", dtype, "--model-timeout=-1")
    return ServerCommand(
        words=(*words, *options),
        folder=folder / "models",
        environment={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")},
    )


def _list_in_cache(cache: Path, model: str, config: Path) -> None:
    """Write what `/v1/models` needs to list a model: a revision with a configuration."""
    repository = cache / f"models--{model}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_REVISION, encoding="utf-8")
    snapshot = repository / "snapshots" / _REVISION
    snapshot.mkdir(parents=True)
    shutil.copyfile(config, snapshot / config.name)
