"""The folder of the studio: which files and runs it contains. Nothing outside it is touched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.run.directory import IN_USE
from loratune.run.errors import RecipeError
from loratune.workflows.search.folder import TuneDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DATA_TYPES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx", ".txt")
"""Endings of data files that are listed and may be dropped in."""
OWN = ".loratune_studio"
"""The folder in which the studio keeps the output of the commands that it started."""
MOST_LISTED = 200
_SWEEP = "sweep.json"
_DEPTH, _RUN_DEPTH = 3, 5
"""Folders below the studio's own in which files and runs are looked for; trials of a sweep lie deeper."""
_SKIPPED = {"__pycache__", "node_modules", "site-packages", "checkpoints"}


@dataclass(frozen=True, slots=True)
class StudioFolder:
    """The folder that the studio works in.

    Attributes:
        root: The folder, resolved.
    """

    root: Path

    @classmethod
    def of(cls, folder: Path) -> StudioFolder:
        """Return the places in a folder.

        Raises:
            RecipeError: There is no such folder.
        """
        if not folder.is_dir():
            raise RecipeError("no such folder", file=folder, fix="name the folder with your data and runs")
        return cls(folder.resolve())

    @property
    def own(self) -> Path:
        """The folder of the studio's own files."""
        return self.root / OWN

    def inside(self, name: str) -> Path:
        """Return a path in the folder, with all links followed.

        Raises:
            RecipeError: It leads out of the folder.
        """
        if "\0" in name or not name:
            raise RecipeError(f"{name!r} is not a path", fix="name a file or folder")
        path = Path(os.path.realpath(self.root / name))
        if not path.is_relative_to(self.root):
            raise RecipeError(
                f"{name} is outside the studio's folder {self.root}",
                fix="copy it into the folder, or start `loratune studio` in a folder that contains it",
            )
        return path

    def short(self, path: Path) -> str:
        """Return a path relative to the folder, as commands that run there name it."""
        return path.relative_to(self.root).as_posix()

    def data_files(self) -> list[str]:
        """Return the data files in the folder and its subfolders, without what runs contain."""
        return self._files(lambda path: path.suffix.lower() in DATA_TYPES and not _of_model(path))

    def recipes(self) -> list[str]:
        """Return the YAML files that look like recipes."""
        return self._files(_is_recipe)

    def model_folders(self) -> list[str]:
        """Return the folders with a model, and the GGUF files."""
        folders = [p.parent for p in self._walk() if p.name == "config.json" and any(p.parent.glob("*.safetensors"))]
        files = [path for path in self._walk() if path.suffix == ".gguf"]
        return [self.short(path) for path in (*folders, *files) if path != self.root]

    def runs(self) -> list[Path]:
        """Return the run directories in the folder, down to a limited depth, since it may be a home directory."""
        return self._folders_with("lock.json")

    def sweeps(self) -> list[Path]:
        """Return the folders of sweeps, up to the same depth."""
        return self._folders_with(_SWEEP)

    def _folders_with(self, file: str) -> list[Path]:
        found = []
        for folder, below, names in os.walk(self.root):
            here = Path(folder)
            if file in names:
                found.append(here)
            deep = "lock.json" in names or len(here.relative_to(self.root).parts) >= _RUN_DEPTH
            below[:] = [] if deep else [name for name in below if not name.startswith(".") and name not in _SKIPPED]
        return sorted(found)

    def unused(self, name: str) -> Path:
        """Return a path in the folder that does not exist: the name itself, or with a number."""
        path, number = self.inside(name), 2
        stem, suffix = path.stem, path.suffix
        while path.exists():
            path, number = path.with_name(f"{stem}-{number}{suffix}"), number + 1
        return path

    def for_upload(self, name: str) -> Path:
        """Return where a file that was dropped in is kept.

        Raises:
            RecipeError: The name is not that of a data file.
        """
        plain = re.sub(r"[\x00-\x1f\x7f/\\]", "", name.replace("\\", "/").rpartition("/")[2]).strip().lstrip(".")
        if Path(plain).suffix.lower() not in DATA_TYPES or not Path(plain).stem:
            raise RecipeError(f"{name!r} is not a data file", fix=f"one of {', '.join(DATA_TYPES)}")
        return self.unused(plain)

    def _files(self, wanted: Callable[[Path], bool]) -> list[str]:
        return sorted(self.short(path) for path in self._walk() if wanted(path))[:MOST_LISTED]

    def _walk(self) -> Iterator[Path]:
        """Yield the files up to some depth: links are not followed, and runs and hidden folders not entered."""
        for folder, below, names in os.walk(self.root):
            here = Path(folder)
            if _SWEEP in names or any(TuneDir.around(here / name) for name in below):
                below.clear()
                yield from (here / name for name in names if name.endswith(".yaml"))  # the best recipe is for use
                continue
            if "lock.json" in names or IN_USE in names:  # a run
                below.clear()
                continue
            deep = len(here.relative_to(self.root).parts) >= _DEPTH
            below[:] = [] if deep else sorted(b for b in below if not b.startswith(".") and b not in _SKIPPED)
            yield from (here / name for name in names if not name.startswith(".") and not (here / name).is_symlink())


def _of_model(path: Path) -> bool:
    return path.with_name("config.json").exists()


def _is_recipe(path: Path) -> bool:
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        with path.open(encoding="utf-8") as stream:
            return re.search(r"^(model|data|lora|train):\s*$", stream.read(20_000), re.MULTILINE) is not None
    except (OSError, UnicodeDecodeError):
        return False


def as_word(name: str) -> str:
    """Return a path as a word of a command line, where one that begins with a dash would be an option."""
    return f"./{name}" if name.startswith("-") else name
