"""`eject`: write the same run as one plain script that needs only datasets, transformers, peft and trl.

How the script gets the trained tokens is decided by trying. If stock TRL, given the user's own rows, produces exactly
the tokens and labels that loratune trains, the script loads these rows and lets TRL prepare them. If not, tokens and
labels are written next to the script, and the script says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.planning.preparation import Preparation
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe, as_recipe
from loratune.recipe.tasks import require_text
from loratune.run.errors import MachineError, RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.guidance.eject_rows import why_not_directly, write_rows
from loratune.workflows.guidance.eject_script import render_script
from loratune.workflows.guidance.eject_support import check_supported

if TYPE_CHECKING:
    from loratune.run.directory import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Ejected:
    """Files written by `eject`.

    Attributes:
        script: Path of the script.
        rows: Folder with tokens and labels; None if the script loads the user's own rows.
        why_rows: Why TRL cannot produce these tokens and labels itself; empty if it can.
    """

    script: Path
    rows: Path | None
    why_rows: str

    def as_dict(self) -> Record:
        """Return the record that `--json` prints."""
        return {
            "script": str(self.script),
            "rows": str(self.rows) if self.rows is not None else None,
            "why_rows": self.why_rows,
        }


def eject(
    recipe: Preparation | Recipe | str | Path,
    script: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Ejected:
    """Write the run as one plain script.

    Args:
        recipe: The run as it would start, its recipe, or the recipe's file.
        script: Path of the script; None for the recipe's name in the current folder, or `train.py`. Tokens
            and labels, if needed, go to a folder with the same name plus `-rows`.
        overwrite: Whether an existing script or folder may be overwritten.
        progress: Receives progress.

    Raises:
        RecipeError: The file exists, or the script cannot follow a setting.
        MachineError: The script cannot be written.
    """
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "train"
    script = Path(f"{name}.py") if script is None else Path(script)
    prepared = recipe if isinstance(recipe, Preparation) else prepare(as_recipe(recipe), progress)
    require_text(
        prepared.recipe, "loratune eject", "train.engine=trl runs transformers' own Trainer on the same batches"
    )
    check_supported(prepared.recipe)
    if prepared.data.stream is not None:
        raise RecipeError("an ejected script cannot stream its data", fix="data.streaming=false")
    rows = script.with_name(f"{script.stem}-rows")
    for path in (script, rows):
        if path.exists() and not overwrite:
            raise RecipeError("file already exists", file=path, fix="use --overwrite, or --out FILE")
    progress.line("letting TRL prepare the data and comparing every token and label with loratune's")
    why_rows = why_not_directly(prepared)
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        if why_rows:
            write_rows(prepared, rows)
        script.write_text(render_script(prepared, rows if why_rows else None, why_rows), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write: {error}", file=script, fix="choose another place with --out FILE") from error
    return Ejected(script=script, rows=rows if why_rows else None, why_rows=why_rows)
