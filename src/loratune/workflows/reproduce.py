"""`reproduce`: a finished run once more, in a new directory, and whether the same adapter came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from loratune.model.gguf_import import file_sha256
from loratune.planning.lock import differences, versions
from loratune.planning.preparation import Preparation
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.train import train

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What came of it.

    Attributes:
        run: The new run.
        original: The run that was reproduced.
        equal: Whether the adapters are the same file, bit for bit.
        largest_difference: Between two weights; infinite where the adapters have other shapes.
        num_different, num_weights: How many weights differ, of how many.
    """

    run: RunDir
    original: RunDir
    equal: bool
    largest_difference: float
    num_different: int
    num_weights: int

    def as_error(self) -> RunError:
        """What to say where the adapters differ."""
        return RunError(
            f"another adapter: {self.num_different:,} of {self.num_weights:,} weights differ, by at most "
            f"{self.largest_difference:.2g}",
            file=self.run.adapter,
            fix=f"`loratune diff {self.original.root} {self.run.root}` shows what else does",
        )

    def as_dict(self) -> Record:
        """For `--json`."""
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

    On a CPU with the same versions and threads the adapters are equal to the bit. On a GPU, and with other versions, they
    may not be; then it is said how far they are apart.

    Args:
        root: The finished run.
        out: The new run's directory; None: beside the old one, with `-again`.
        overwrite: Whether a run that is in `out` may be deleted.
        progress: Who is told how it goes.

    Raises:
        RecipeError: The run is not finished; an input changed since, which is named; or `out` holds something already.
    """
    original = RunDir.open(root)
    if not original.has_adapter:
        raise RecipeError("the run has no adapter to compare with", file=original.root, fix=f"`loratune resume {root}`")
    lock = read_json(original.lock)
    target = Path(out) if out is not None else original.root.with_name(f"{original.root.name}-again")
    if target.resolve() == original.root:
        raise RecipeError("the new run would replace the old one", file=target, fix="--out for another place")
    recipe = Recipe.parse(
        {**lock["recipe"], "train": {**lock["recipe"]["train"], "output_dir": str(target)}}, file=original.lock
    )

    def check(prepared: Preparation) -> None:
        changed = differences(lock, prepared.as_lock())
        if changed:
            raise RecipeError(
                f"changed since the run: {', '.join(changed)}",
                file=original.lock,
                fix=f"restore it, or train anew: `loratune train {original.recipe}`",
            )
        for line in _other_circumstances(lock):
            progress.warn(line)

    written = original.recipe.read_text(encoding="utf-8")
    result = train(recipe, written=written, overwrite=overwrite, progress=progress, on_plan=check)
    return compare(original, result.run)


def compare(original: RunDir, run: RunDir) -> Reproduction:
    """Two adapters, weight by weight."""
    first, second = original.adapter / WEIGHTS, run.adapter / WEIGHTS
    one, other = load_file(first), load_file(second)
    return Reproduction(
        run=run,
        original=original,
        equal=file_sha256(first) == file_sha256(second),
        largest_difference=_largest_difference(one, other),
        num_different=sum(int((one[name] != other[name]).sum()) for name in one if _alike(one, other, name)),
        num_weights=sum(tensor.numel() for tensor in one.values()),
    )


def _alike(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], name: str) -> bool:
    return name in other and one[name].shape == other[name].shape


def _largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    if one.keys() != other.keys() or not all(_alike(one, other, name) for name in one):
        return float("inf")
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def _other_circumstances(lock: Record) -> list[str]:
    """What is no input and still can change the last bits."""
    now = {**versions(lock["recipe"]), "threads": torch.get_num_threads(), "processes": processes.size()}
    machine = lock["machine"]
    before = {**lock["versions"], "threads": machine.get("threads"), "processes": machine.get("processes", 1)}
    changed = [f"{name} {before[name]} → {now.get(name)}" for name in before if before[name] != now.get(name)]
    return [f"not as in the run, the last bits may differ: {', '.join(changed)}"] if changed else []
