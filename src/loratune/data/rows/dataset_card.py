"""The files of a folder's splits as its `README.md` declares them, in the Hub's `configs:` block.

The block is described at https://huggingface.co/docs/hub/datasets-manual-configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from loratune.run.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

_KEYS = {"config_name", "data_files", "data_dir", "default", "drop_labels"}
_FIX = "correct the block `configs:`, or name the files in data.train"


def declared_splits(folder: Path, config: str | None) -> tuple[dict[str, list[Path]] | None, Path]:
    """Return the files of each split that the folder's `README.md` declares, and the folder that it names.

    None in place of the files: they are told apart by their names, in the folder that is returned.

    Args:
        folder: The folder.
        config: The configuration that the recipe names; by default the one called `default` or marked as such.

    Raises:
        DataError: The block cannot be read, names no file that exists, or leaves open which configuration is meant.
    """
    card = folder / "README.md"
    configs = _configs(card) if card.is_file() else []
    if not configs:
        if config is not None:
            fix = "name its subfolder; a README.md with a block `configs:` would define it"
            raise DataError(f"config is {config}, but a folder has none", file=folder, fix=fix)
        return None, folder
    chosen = _choose(card, configs, config)
    if others := ", ".join(sorted(chosen.keys() - _KEYS)):
        raise DataError(f"configs: {others} is not supported", file=card, fix=_FIX)
    files, base = chosen.get("data_files"), f"{chosen['data_dir']}/" if chosen.get("data_dir") else ""
    if files is None:
        if base:
            _found(card, f"{base}**/*")  # or it is no folder with files, inside of this one
        return None, folder / base
    splits: dict[str, list[Path]] = {}
    for entry in files if isinstance(files, list) else [files]:
        split, paths = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(path, str):
                raise DataError("configs: data_files without a path", file=card, fix=_FIX)
            splits.setdefault(str(split), []).extend(_found(card, base + path))
    return {split: list(dict.fromkeys(found)) for split, found in splits.items()}, folder


def _configs(card: Path) -> list[dict[str, Any]]:
    from huggingface_hub.repocard import metadata_load  # imports for half a second, and few folders have a card

    try:
        metadata = metadata_load(card) or {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"its metadata cannot be read: {reason}", file=card, fix="correct the lines between ---"
        ) from None
    configs = metadata.get("configs") or []
    if not isinstance(configs, list) or not all(isinstance(entry, dict) for entry in configs):
        raise DataError("configs is not a list of configurations", file=card, fix=_FIX)
    return configs


def _choose(card: Path, configs: list[dict[str, Any]], wanted: str | None) -> dict[str, Any]:
    by_name = {str(entry.get("config_name", "default")): entry for entry in configs}
    marked = [name for name, entry in by_name.items() if entry.get("default")]
    name = wanted or (marked[0] if marked else "default" if "default" in by_name else next(iter(by_name)))
    if name not in by_name or (wanted is None and len(by_name) > 1 and not marked and name != "default"):
        first = next(iter(by_name))
        raise DataError(
            f"there is no config {wanted}" if wanted else "several configs, and none is the default",
            file=card,
            fix=f"it has {', '.join(by_name)}: data.train='{{name: {card.parent}, config: {first}}}'",
        )
    return by_name[name]


def _found(card: Path, pattern: str) -> list[Path]:
    """Return the files that match a pattern, inside of the folder only."""
    folder = card.parent.resolve()
    pattern = pattern.removeprefix("./")
    try:
        found = sorted(card.parent.glob(pattern))
    except (NotImplementedError, ValueError):  # an absolute path, or an empty one
        found = []
    files = [file for file in found if file.is_file() and file.resolve().is_relative_to(folder)]
    if not files:
        raise DataError(f"configs: no file matches {pattern!r}", file=card, fix=_FIX)
    return files
