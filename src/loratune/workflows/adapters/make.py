"""Adapters made of others: combined, resized, converted, extracted from a full fine-tune.

Each goes the same way: a folder under a temporary name, read back, its updates compared with the closed form in
float64, its logits by PEFT with those of the closed form where the base is on this machine, and only then renamed.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from loratune.exporting.adapters.algebra import discarded_share, truncated
from loratune.exporting.adapters.check import check_logits, check_updates, closed_form, weighted_closed_form
from loratune.exporting.adapters.combine import combine
from loratune.exporting.adapters.extract import extract
from loratune.exporting.adapters.folder import Adapter, num_parameters, read_folder, targets_of, write_folder
from loratune.exporting.merge_weights import MergedWeights
from loratune.exporting.staging import atomic_folder, check_target
from loratune.model.adapter.module_roles import linear_modules
from loratune.planning.parameters import skeleton
from loratune.run.errors import RecipeError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.adapters.base import base_folder, biases_of, folder_of_model, require_one_base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratune.exporting.adapters.algebra import Discarded
    from loratune.exporting.adapters.check import ClosedForm
    from loratune.run.directory import Record


_TOKENIZER = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges")
"""How the files of tokenizer and template begin."""


def combine_adapters(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] = (),
    method: str = "concat",
    rank: int | None = None,
    density: float = 0.5,
    base: str | Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Record:
    """Write Σ weight · update of several adapters of one base as one adapter.

    Args:
        folders: The adapters.
        out: The folder to write.
        weights: A factor for each; all 1 if none are given.
        method: See `exporting.adapters.combine`.
        rank: The rank of the result where the method has one.
        density: The share of elements that `ties` and `dare` keep.
        base: The base's folder, where the adapters do not name one that is here.
        progress: Receives lines and warnings.

    Raises:
        RecipeError: The adapters are of different bases, or hold more than can be added.
        RunError: What was written is not the weighted sum, which is a bug.
    """
    adapters = [read_folder(Path(folder).expanduser()) for folder in folders]
    require_one_base(adapters, base)
    factors = list(weights) or [1.0] * len(adapters)
    place = base_folder(adapters, base)
    result, losses = combine(
        adapters, factors, method=method, rank=rank, density=density, base_biases=biases_of(place, adapters)
    )
    wanted = weighted_closed_form(adapters, factors) if method == "concat" else closed_form(result)
    return _write(result, Path(out), wanted, place, progress, losses)


def resize_adapter(
    folder: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: str | Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Record:
    """Write the best approximation of an adapter by one of lower rank, matrix by matrix (SVD).

    Args:
        folder: The adapter.
        out: The folder to write.
        rank: The highest rank of the result.
        energy: The share of each update's squared norm to keep at least; ranks then differ by matrix.
        base: The base's folder, where the adapter does not name one that is here.
        progress: Receives lines and warnings.

    Raises:
        RecipeError: Neither rank nor energy is given, or the adapter is DoRA or holds other things.
    """
    if (rank is None and energy is None) or (rank is not None and rank < 1) or not 0 < (energy or 1) <= 1:
        raise RecipeError(
            f"rank {rank}, energy {energy}", fix="--rank 8, or --energy 0.99 of the squared norm, or both"
        )
    adapter = read_folder(Path(folder).expanduser())
    adapter.require_plain("resize")
    found = {module: truncated(update, rank=rank, energy=energy) for module, update in adapter.updates.items()}
    settings = {**adapter.config, "target_modules": targets_of([adapter], adapter.updates)}
    result = replace(adapter, config=settings, updates={module: update for module, (update, _) in found.items()})
    losses = {module: discarded for module, (_, discarded) in found.items()}
    return _write(result, Path(out), closed_form(result), base_folder([adapter], base), progress, losses)


def convert_adapter(
    folder: str | Path, out: str | Path, *, base: str | Path | None = None, progress: Progress = NO_PROGRESS
) -> Record:
    """Write an adapter as a plain LoRA of scale alpha/r = 1, for programs that do not know its variant or patterns."""
    adapter = read_folder(Path(folder).expanduser())
    result, _ = combine([adapter], [1.0])
    wanted = weighted_closed_form([adapter], [1.0])
    return _write(result, Path(out), wanted, base_folder([adapter], base), progress, {})


def extract_adapter(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress = NO_PROGRESS,
) -> Record:
    """Write an adapter with what a full fine-tune changed in the linear layers of its base, by SVD.

    Args:
        tuned: The fine-tune's folder.
        base: Its base's folder.
        out: The folder to write.
        rank: The highest rank; None for no limit but `energy`.
        energy: The share of each change's squared norm to keep at least.
        progress: Shows how far the work is.

    Raises:
        RecipeError: The two are of different architectures, or nothing differs.
    """
    before, after = (folder_of_model(folder) for folder in (base, tuned))
    config = AutoConfig.from_pretrained(before)
    layers = linear_modules(skeleton(config))
    modules = {name: isinstance(layer, Conv1D) for name, layer in layers.items()}
    with MergedWeights(before, {}) as weights:
        count = len(weights.names)
    with progress.task("comparing", count, "tensors") as task:
        found = extract(before, after, modules, rank=rank, energy=energy, progress=lambda: task.advance(1))
    if found.left_out:
        largest = max(found.left_out, key=lambda name: found.left_out[name])
        progress.warn(
            f"{plural(len(found.left_out), 'changed tensor')} are no matrices of linear layers and are not in the "
            f"adapter; the largest change is {found.left_out[largest]:.3g}, of {largest}"
        )
    settings: dict[str, Any] = {
        "target_modules": sorted(found.updates),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(before),
        "fan_in_fan_out": any(modules[name] for name in found.updates),
    }
    adapter = Adapter(path=after, config=settings, updates=found.updates)
    return _write(adapter, Path(out), closed_form(adapter), before, progress, found.losses, found.left_out)


def _write(
    adapter: Adapter,
    out: Path,
    wanted: ClosedForm,
    base: Path | None,
    progress: Progress,
    losses: Mapping[str, Discarded],
    left_out: Mapping[str, float] = MappingProxyType({}),
) -> Record:
    """Write an adapter, prove it, and return the record of both."""
    check_target(out)
    with atomic_folder(out) as folder:
        write_folder(folder, adapter)
        for path in adapter.path.iterdir():
            if path.is_file() and path.name.startswith(_TOKENIZER):
                shutil.copyfile(path, folder / path.name)
        written = read_folder(folder)
        error = check_updates(written, wanted)
        logits: tuple[float, float] | None = None
        if base is None:
            progress.warn("the logits are not compared, since the base is not on this machine: --base FOLDER names it")
        else:
            logits = check_logits(base, folder, wanted, adapter)
    share, worst = max(((part.share, name) for name, part in losses.items()), default=(0.0, ""))
    ranks = [update.rank for update in adapter.updates.values()]
    return {
        "folder": str(out.absolute()),
        "ranks": [min(ranks), max(ranks)],
        "num_parameters": num_parameters(adapter),
        "discarded_share": discarded_share(losses.values()),
        "worst_matrix": worst if share else None,
        "worst_share": share,
        "left_out": dict(left_out),
        "check": {
            "relative_error": error,
            "logits_difference": logits and logits[0],
            "logits_change": logits and logits[1],
        },
    }
