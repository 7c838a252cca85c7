"""Open a finished run: its recipe, its data, its base and its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.data.prompts import stop_token_ids
from loratune.data.rows.sources import is_local
from loratune.exporting.adapter_matrices import LowRank, Replaced, read_adapter, read_replaced
from loratune.exporting.merge_weights import weight_files
from loratune.model.device import device_here
from loratune.model.load import download_weights, gguf_file, load_config
from loratune.planning.lock import changed_inputs
from loratune.planning.memory.optimizer import OF_BITSANDBYTES
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.recipe.tasks import load_task, require_text
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.workflows.locked_recipe import located

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratune.planning.preparation import Preparation
    from loratune.recipe.recipe import DataSection
    from loratune.run.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A finished run of a model that writes text, and everything an export needs of it.

    Attributes:
        run: The run directory.
        prepared: The run's recipe, data and tokenizer.
        base: The folder with the base's weights.
        config: transformers' configuration of the base.
        updates: Module name → the adapter's low-rank update.
        replaced: Tensor name → the values that the adapter replaces it with.
        stops: The tokens that end an answer.
        source: The GGUF file that the base was imported from; None where it was not a GGUF file.
        progress: Shows how far the work is.
    """

    run: RunDir
    prepared: Preparation
    base: Path
    config: Any
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, Replaced]
    stops: tuple[int, ...]
    source: Path | None
    progress: Progress

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.run.root.name

    @property
    def base_bytes(self) -> int:
        """The size of the base's weight files, in bytes."""
        return sum((self.base / file).stat().st_size for file in weight_files(self.base))


def recipe_of(run: RunDir | str | Path) -> Recipe:
    """Return the effective recipe of a run: every setting resolved.

    Raises:
        RecipeError: The folder is not a run.
    """
    run = run if isinstance(run, RunDir) else RunDir.open(run)
    return Recipe.parse(located(read_json(run.lock)), file=run.lock)


def recipe_here(run: RunDir, progress: Progress) -> Recipe:
    """Return the recipe of a finished run for use on this machine, which may be another one than it was trained on.

    What only training needs is not asked for again: trackers, the optimizer's package, the adapter to start from, the
    device, a compiler, room for checkpoints, and the training rows where the held-out ones have files of their own.
    """
    recipe = recipe_of(run)
    device = device_here(recipe.train.device)
    changes: dict[str, Any] = {
        "device": device,
        "report_to": (),
        "output_dir": str(run.root),
        "save_every": "never",
        "final_adapter": "last",
        "average_checkpoints": None,
    }
    if device != recipe.train.device:
        changes["compile"] = False
    if recipe.train.optimizer in OF_BITSANDBYTES:
        changes["optimizer"] = "adamw"
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=changes),
            "lora": recipe.lora.model_copy(update={"start_from": None}),
            "data": _readable(recipe, progress),
        }
    )


def _readable(recipe: Recipe, progress: Progress) -> DataSection:
    """Return the data section; if training files are gone, with the held-out rows in their place.

    A classifier's classes come from its training rows, so it needs them.
    """
    data = recipe.data
    gone = [source for source in data.train if is_local(source) and not Path(source.name).expanduser().exists()]
    if gone and isinstance(data.eval, tuple) and load_task(recipe.model.task).writes_text:
        progress.warn(f"{gone[0].name} no longer exists: the held-out rows stand in for the training rows")
        return data.model_copy(update={"train": data.eval})
    return data


def open_run(root: str | Path, progress: Progress) -> tuple[RunDir, Preparation]:
    """Open a finished run and prepare its data again, on the device of this machine.

    Raises:
        RecipeError: The run has no adapter yet, or its base or template changed since.
    """
    run = RunDir.open(root)
    run.require_adapter()
    prepared = prepare(recipe_here(run, progress), progress)
    # Files that were added to the model's folder after the run began are not in its lock, and were not trained with.
    changed = changed_inputs(read_json(run.lock), prepared.as_lock(), keys=("model", "template"), known_only=True)
    if changed:
        raise RecipeError(
            f"changed since the run: {', '.join(changed)}", file=run.lock, fix="restore the base model, or train again"
        )
    return run, prepared


def open_finished(root: str | Path, progress: Progress) -> FinishedRun:
    """Open a finished run of a model that writes text.

    Raises:
        RecipeError: As for `open_run`, or the model is a classifier.
    """
    require_text(recipe_of(root), "this", f"loratune merge {root} OUT, which transformers loads")
    run, prepared = open_run(root, progress)
    recipe = prepared.recipe
    return FinishedRun(
        run=run,
        prepared=prepared,
        base=download_weights(prepared.model.base),
        config=load_config(prepared.model.base, recipe.model),
        updates=read_adapter(run.adapter),
        replaced=read_replaced(run.adapter),
        stops=stop_token_ids(prepared.model.tokenizer),
        source=gguf_file(recipe.model),
        progress=progress,
    )
