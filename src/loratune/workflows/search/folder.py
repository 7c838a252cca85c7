"""The folder of a sweep.

SWEEP/sweep.json        what is tried          SWEEP/result.json   the ranked trials
SWEEP/trials/01/        a run directory        SWEEP/sweep.html    the same as a page
SWEEP/losses/01-0.json  losses at a rung       SWEEP/best.yaml     the recipe with the best settings
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.run.directory import RunDir, cannot_write
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class SweepDir:
    """The folder of one sweep.

    Attributes:
        root: The folder itself.
    """

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "sweep.json"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def page(self) -> Path:
        return self.root / "sweep.html"

    @property
    def best(self) -> Path:
        return self.root / "best.yaml"

    def trial(self, number: int) -> RunDir:
        """Return the run directory of a trial, counted from 1."""
        return RunDir.at(self.root / "trials" / f"{number:02}")

    def losses(self, number: int, rung: int) -> Path:
        """Return the file of a trial's losses at a rung, counted from 0."""
        return self.root / "losses" / f"{number:02}-{rung}.json"

    def all_losses(self) -> list[Path]:
        """Return the files of all losses."""
        return sorted((self.root / "losses").glob("*.json"))

    @classmethod
    def create(cls, root: Path, *, overwrite: bool) -> SweepDir:
        """Return the folder of a new sweep, or of one that is to be continued.

        Raises:
            RecipeError: The folder holds something else.
            MachineError: It cannot be written.
        """
        folder = cls(root.expanduser().resolve())
        if folder.root.exists() and any(folder.root.iterdir()) and not folder.plan.is_file():
            raise RecipeError(
                "the folder exists and is not a sweep", file=folder.root, fix="train.output_dir=… for another folder"
            )
        if overwrite and folder.plan.is_file():
            with folder.exclusive():
                pass
            shutil.rmtree(folder.root)
        with cannot_write(folder.root, fix="train.output_dir=… for another folder"):
            (folder.root / "losses").mkdir(parents=True, exist_ok=True)
        return folder

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the sweep against other commands.

        Raises:
            RecipeError: Another process has the lock.
        """
        return RunDir(self.root).exclusive()
