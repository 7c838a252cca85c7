"""The recipes and the example data that come with the package, in an installed wheel and in a checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

from loratune.recipe.recipe import Recipe, Source
from loratune.run.errors import MachineError


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes, by name."""
    return {path.stem: path for path in sorted(_folder("recipes").glob("*.yaml"))}


def missing_rows(recipe: Recipe) -> list[str]:
    """Return the data files of a shipped recipe that are neither here nor in the package."""
    return [name for name in _files(recipe) if not Path(name).exists() and not _shipped(name).is_file()]


def copy_rows(recipe: Recipe) -> list[Path]:
    """Copy the data files of a shipped recipe to where the recipe names them, in the current folder.

    Returns:
        The files that were copied; those that exist are left alone.

    Raises:
        MachineError: A file cannot be written.
    """
    copied = []
    for name in _files(recipe):
        path = Path(name)
        if path.exists() or not _shipped(name).is_file():
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_shipped(name), path)
        except OSError as error:
            raise MachineError(f"cannot write: {error}", file=path, fix="choose a folder you may write in") from error
        copied.append(path)
    return copied


def _files(recipe: Recipe) -> list[str]:
    held_out = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
    sources = [source for source in (*recipe.data.train, *held_out) if isinstance(source, Source)]
    return [source.name for source in sources if source.name.startswith("examples/")]


def _shipped(name: str) -> Path:
    return _folder("examples").parent / name


def _folder(name: str) -> Path:
    """Return a folder of the installed package, or of the checkout that this file belongs to."""
    installed = Path(__file__).resolve().parents[2] / name
    return installed if installed.is_dir() else Path(__file__).resolve().parents[4] / name
