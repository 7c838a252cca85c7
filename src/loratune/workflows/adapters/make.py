"""Adapters made from others: combined, resized, converted, or extracted from a full fine-tune.

Each is written to a folder under a temporary name and read back. Its updates are compared with the closed form in
float64, and its logits by PEFT with those of the closed form if the base is on this machine; only then is it renamed.
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
from loratune.exporting.adapters.check import check_by_peft, check_updates, closed_form, weighted_closed_form
from loratune.exporting.adapters.combine import EXACT_SUM, Method, combine
from loratune.exporting.adapters.extract import extract
from loratune.exporting.adapters.folder import Adapter, num_parameters, read_folder, targets_of, write_folder
from loratune.exporting.merge_weights import MergedWeights
from loratune.exporting.staging import atomic_folder, check_target
from loratune.model.adapter.module_roles import linear_modules
from loratune.planning.parameters import skeleton
from loratune.run.errors import RecipeError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.adapters.base import biases_of, checked_base, folder_of_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratune.exporting.adapters.algebra import Discarded
    from loratune.exporting.adapters.check import ClosedForm
    from loratune.run.directory import Record


_NO_BASE = "the base is not on this machine (--base FOLDER names it)"
_TOKENIZER = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges")
"""How the files of tokenizer and template begin."""


def combine_adapters(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] = (),
    method: Method = EXACT_SUM,
    base: str | Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Record:
    """Write Σ weight · update of several adapters of one base as one adapter.

    Args:
        folders: The adapters.
        out: The folder to write.
        weights: A factor for each; all 1 if none are given.
        method: How they are added; by default exactly.
        base: The base's folder, where the adapters do not name one that is here.
        progress: Receives lines and warnings.

    Raises:
        RecipeError: The adapters are of different bases, or hold more than can be added.
        RunError: What was written is not the weighted sum, which is a bug.
    """
    adapters = [read_folder(Path(folder).expanduser()) for folder in folders]
    for adapter in adapters:
        adapter.require_plain("combine")
    factors = list(weights) or [1.0] * len(adapters)
    place = checked_base(adapters, base, progress)
    biases = biases_of(place, {name for adapter in adapters for name in adapter.biases})
    result, losses = combine(adapters, factors, method=method, base_biases=biases)
    wanted = weighted_closed_form(adapters, factors) if method.name == "concat" else closed_form(result)
    return {**_write(result, Path(out), wanted, place, progress, losses), "seed": method.used_seed}


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
    if rank is None and energy is None:
        raise RecipeError(
            "neither a rank nor a share of the squared norm is given", fix="--rank 8, or --energy 0.99, or both"
        )
    _require_size(rank, energy)
    adapter = read_folder(Path(folder).expanduser())
    adapter.require_plain("resize")
    place = checked_base([adapter], base, progress)
    found = {module: truncated(update, rank=rank, energy=energy) for module, update in adapter.updates.items()}
    settings = {**adapter.config, "target_modules": targets_of([adapter], adapter.updates)}
    result = replace(adapter, config=settings, updates={module: update for module, (update, _) in found.items()})
    losses = {module: discarded for module, (_, discarded) in found.items()}
    return _write(result, Path(out), closed_form(result), place, progress, losses)


def convert_adapter(
    folder: str | Path, out: str | Path, *, base: str | Path | None = None, progress: Progress = NO_PROGRESS
) -> Record:
    """Write an adapter as plain LoRA of scale alpha/r = 1, for programs that do not support its variant or patterns."""
    adapter = read_folder(Path(folder).expanduser())
    adapter.require_plain("convert")
    place = checked_base([adapter], base, progress)
    result, _ = combine([adapter], [1.0])
    return _write(result, Path(out), closed_form(adapter), place, progress, {})


def _require_size(rank: int | None, energy: float | None) -> None:
    """Refuse a rank or a share of the squared norm that no approximation has."""
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank} is not 1 or more", fix="--rank 8")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy {energy} is not above 0 and at most 1", fix="--energy 0.99")


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
    _require_size(rank, energy)
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
            plural(len(found.left_out), "changed tensor is not a matrix", "changed tensors are not matrices")
            + " in the base's linear layers, so the adapter lacks "
            + ("it" if len(found.left_out) == 1 else "them")
            + f"; the largest change is {found.left_out[largest]:.3g}, of {largest}"
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
        found = check_by_peft(base, folder, wanted, adapter) if base is not None else _NO_BASE
        if isinstance(found, str):
            progress.warn(f"the logits are not compared: {found}")
        size = num_parameters(folder)
    share, worst = max(((part.share, name) for name, part in losses.items()), default=(0.0, ""))
    ranks = [update.rank for update in adapter.updates.values()]
    return {
        "folder": str(out.absolute()),
        "ranks": [min(ranks), max(ranks)],
        "num_parameters": size,
        "discarded_share": discarded_share(losses.values()),
        "worst_matrix": worst if share else None,
        "worst_share": share,
        "left_out": dict(left_out),
        "check": {
            "relative_error": error,
            "peft_error": None if isinstance(found, str) else found.relative_error,
            "logits_difference": None if isinstance(found, str) else found.logits_difference,
            "logits_change": None if isinstance(found, str) else found.logits_change,
        },
        "seed": None,
    }
