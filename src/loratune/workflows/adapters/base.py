"""The base of adapters of any origin: where it is, and whether several adapters have the same one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from loratune.model.gguf_import import file_sha256
from loratune.model.safetensors_headers import stored_name, weight_files_of
from loratune.run.directory import read_json
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from loratune.exporting.adapters.folder import Adapter

_FIX = "--base FOLDER, where the base's config.json and safetensors are"


def folder_of_model(name: str | Path) -> Path:
    """Return a model's folder.

    Raises:
        RecipeError: It has no weights in safetensors.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file() or not weight_files_of(folder):
        raise RecipeError(f"{name} is no folder with a config.json and safetensors", fix=_FIX)
    return folder.resolve()


def base_folder(adapters: Sequence[Adapter], given: str | Path | None) -> Path | None:
    """Return the folder of the adapters' base: the one given, or one that they name; None if none is here."""
    if given is not None:
        return folder_of_model(given)
    folders = (Path(adapter.base_name).expanduser() for adapter in adapters if adapter.base_name)
    return next((folder.resolve() for folder in folders if folder.is_dir() and weight_files_of(folder)), None)


def required_base(adapter: Adapter, given: str | Path | None) -> Path:
    """Return the folder of an adapter's base.

    Raises:
        RecipeError: It is not here.
    """
    found = base_folder([adapter], given)
    if found is None:
        raise RecipeError(
            f"the base that the adapter names is not a folder here: {adapter.base_name or 'none'}",
            file=adapter.path,
            fix=_FIX,
        )
    require_one_base([adapter], found)
    return found


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a model."""
    return {path.name: file_sha256(path) for path in weight_files_of(folder)}


def require_one_base(adapters: Sequence[Adapter], given: str | Path | None) -> None:
    """Refuse adapters of different bases: by their weights where these are known, by name otherwise.

    The weights are known of a folder that is here, and of a run of loratune, whose lock names them.

    Raises:
        RecipeError: The bases differ.
    """
    known = {adapter.path: _known_fingerprint(adapter) for adapter in adapters}
    wanted = fingerprint(folder_of_model(given)) if given is not None else None
    place = str(given)
    for adapter in adapters:
        found = known[adapter.path]
        if found is None:
            continue
        if wanted is None:
            wanted, place = found, str(adapter.path)
        if found != wanted:
            raise RecipeError(
                f"the adapter was trained on other weights ({adapter.base_name}) than {place}",
                file=adapter.path,
                fix="adapters can only be added on one and the same base",
            )
    unknown = {adapter.base_name for adapter in adapters if known[adapter.path] is None}
    names = unknown | {adapter.base_name for adapter in adapters} if unknown else set()
    if given is None and len(names) > 1:
        raise RecipeError(
            f"the adapters name different bases: {' and '.join(sorted(name or 'none' for name in names))}",
            fix="--base FOLDER, if it is the base of all of them",
        )


def biases_of(folder: Path | None, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """Return the base's own values of the biases that adapters replace; empty without a base."""
    names = {name for adapter in adapters for name in adapter.biases}
    found: dict[str, torch.Tensor] = {}
    for file in weight_files_of(folder) if folder is not None and names else ():
        with safe_open(file, framework="pt") as tensors:
            stored = set(tensors.keys())
            for name in names - found.keys():
                own = stored_name(name, stored)
                if own is not None:
                    found[name] = tensors.get_tensor(own)
    return found


def _known_fingerprint(adapter: Adapter) -> dict[str, str] | None:
    """Return the SHA-256 of each weight file of the base that an adapter was trained on; None if that is not known."""
    lock = adapter.path.parent / "lock.json"
    if lock.is_file():
        files: dict[str, str] = read_json(lock).get("inputs", {}).get("model", {})
        weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
        if weights:
            return weights
    folder = base_folder([adapter], None)
    return None if folder is None else fingerprint(folder)
