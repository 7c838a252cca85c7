"""Train a finished run again in a new directory, and compare the two adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from loratune.planning.lock import changed_inputs, versions
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.digest import file_sha256
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.locked_recipe import without_other_tasks
from loratune.workflows.train import train

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratune.planning.preparation import Preparation


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """The comparison of two runs' adapters.

    Attributes:
        run: The new run.
        original: The run that was reproduced.
        equal: Whether the adapter files are equal, bit for bit.
        largest_difference: The largest absolute difference of two weights; infinite where the shapes differ.
        num_different: The number of weights that differ.
        num_weights: The number of weights.
    """

    run: RunDir
    original: RunDir
    equal: bool
    largest_difference: float
    num_different: int
    num_weights: int

    def as_error(self) -> RunError:
        """Return the error that reports different adapters."""
        return RunError(
            f"not the same adapter: {self.num_different:,} of {self.num_weights:,} weights differ, by at most "
            f"{self.largest_difference:.2g}",
            file=self.run.adapter,
            fix=f"`loratune diff {self.original.root} {self.run.root}` shows what else differs",
        )

    def as_dict(self) -> Record:
        """Return the record for `--json`."""
        return {
            "run": str(self.run.root),
            "original": str(self.original.root),
            "equal": self.equal,
            "largest_difference": self.largest_difference,
            "num_different": self.num_different,
            "num_weights": self.num_weights,
        }


def reproduce(
    root: str | Path, out: str | Path | None = None, *, overwrite: bool = False, progress: Progress = NO_PROGRESS
) -> Reproduction:
    """Train a finished run again from the same inputs, and compare the adapters.

    On a CPU with the same versions and threads the adapters are equal, bit for bit. On a GPU, or with other versions,
    they may differ; the result says by how much.

    Args:
        root: The finished run.
        out: The new run's directory; None for the old one's name with `-again`.
        overwrite: Whether to overwrite an existing run in `out`.
        progress: The listener for progress and warnings.

    Raises:
        RecipeError: The run is not finished, an input changed since (the error names it), or `out` is not empty.
    """
    original = RunDir.open(root)
    original.require_adapter()
    lock = read_json(original.lock)
    lineage = lock.get("extends")
    if lineage is not None and not lineage["exact"]:
        raise RecipeError(
            f"the run began with the adapter and the optimizer's state of {lineage['run']}, which a run of its recipe "
            "alone would not have",
            file=original.lock,
            fix=f"extend that run again, `{lineage['command']}` with another --out, and compare the adapters",
        )
    target = Path(out) if out is not None else original.root.with_name(f"{original.root.name}-again")
    if target.resolve() == original.root:
        raise RecipeError(
            "the new run would overwrite the old one", file=target, fix="choose another folder with --out"
        )
    own = without_other_tasks(lock["recipe"])
    recipe = Recipe.parse({**own, "train": {**own["train"], "output_dir": str(target)}}, file=original.lock)

    def check(prepared: Preparation) -> None:
        changed = changed_inputs(lock, prepared.as_lock())
        if changed:
            raise RecipeError(
                f"changed since the run: {', '.join(changed)}",
                file=original.lock,
                fix=f"restore it, or train again: `loratune train {original.recipe}`",
            )
        changed = _changed_environment(lock)
        if changed:
            progress.warn(f"not the same environment as in the run, so the last bits may differ: {', '.join(changed)}")

    written = original.recipe.read_text(encoding="utf-8")
    result = train(recipe, written=written, overwrite=overwrite, progress=progress, on_plan=check)
    return compare_adapters(original, result.run)


def compare_adapters(original: RunDir, run: RunDir) -> Reproduction:
    """Compare two runs' adapters weight by weight."""
    first, second = original.adapter_weights, run.adapter_weights
    one, other = load_file(first), load_file(second)
    return Reproduction(
        run=run,
        original=original,
        equal=file_sha256(first) == file_sha256(second),
        largest_difference=_largest_difference(one, other),
        num_different=sum(int((one[name] != other[name]).sum()) for name in one if _same_shape(one, other, name)),
        num_weights=sum(tensor.numel() for tensor in one.values()),
    )


def _same_shape(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], name: str) -> bool:
    return name in other and one[name].shape == other[name].shape


def _largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    if one.keys() != other.keys() or not all(_same_shape(one, other, name) for name in one):
        return float("inf")
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def _changed_environment(lock: Record) -> list[str]:
    """Name what differs from the run and is not an input, but can change the last bits."""
    now = {**versions(lock["recipe"]), "threads": torch.get_num_threads(), "processes": processes.size()}
    machine = lock["machine"]
    before = {**lock["versions"], "threads": machine.get("threads"), "processes": machine.get("processes", 1)}
    return [f"{name} {before[name]} → {now.get(name)}" for name in before if before[name] != now.get(name)]
