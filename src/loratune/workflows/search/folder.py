"""The folders of `loratune sweep` and `loratune tune`.

SWEEP/sweep.json        what is tried          SWEEP/result.json   the ranked trials
SWEEP/trials/01/        a run directory        SWEEP/sweep.html    the same as a page
SWEEP/losses/01-0.json  losses at a rung       SWEEP/best.yaml     the recipe with the best settings

TUNE/rates/             a sweep of rates       TUNE/tune.json      what was chosen, and why
TUNE/shapes/            one of rank, targets   TUNE/tuned.yaml     the recipe with it
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.run.directory import IN_USE, RunDir, cannot_write, is_leftover
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator
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

    @property
    def _never_began(self) -> bool:
        """Whether the folder holds only what is there before the plan: an error in the data may have ended a sweep."""
        others = {path.name for path in self.root.iterdir() if not is_leftover(path)} - {"losses", IN_USE}
        return not others and not self.all_losses()

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
        if folder.root.exists() and not folder.plan.is_file() and not folder._never_began:
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


@dataclass(frozen=True, slots=True)
class TuneDir:
    """The folder of one `loratune tune`.

    Attributes:
        root: The folder itself.
    """

    root: Path

    @property
    def rates(self) -> SweepDir:
        return SweepDir(self.root / "rates")

    @property
    def shapes(self) -> SweepDir:
        return SweepDir(self.root / "shapes")

    @property
    def result(self) -> Path:
        return self.root / "tune.json"

    @property
    def recipe(self) -> Path:
        return self.root / "tuned.yaml"

    @classmethod
    def around(cls, sweep: Path) -> TuneDir | None:
        """Return the folder that a sweep is a part of; None for a sweep of its own."""
        found = cls(sweep.parent)
        is_part = sweep in (found.rates.root, found.shapes.root) and found.root.name.endswith("-tune")
        return found if is_part else None

    @property
    def is_in_use(self) -> bool:
        """Whether a process works on it."""
        return RunDir(self.root).is_in_use

    @contextmanager
    def exclusive(self, *, overwrite: bool = False) -> Iterator[None]:
        """Lock it against other commands, both sweeps and what comes between them.

        Args:
            overwrite: Whether what was found before is deleted.

        Raises:
            RecipeError: Another process has the lock.
            MachineError: It cannot be written.
        """
        with cannot_write(self.root, fix="train.output_dir=… for another folder"):
            self.root.mkdir(parents=True, exist_ok=True)
        with RunDir(self.root).exclusive():
            if overwrite:
                for sweep in (self.rates, self.shapes):
                    SweepDir.create(sweep.root, overwrite=True)
                with cannot_write(self.root):
                    self.result.unlink(missing_ok=True)
                    self.recipe.unlink(missing_ok=True)
            yield
