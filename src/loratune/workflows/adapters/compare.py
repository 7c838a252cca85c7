"""Adapters of any origin, inspected, compared with each other, and merged into their base."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from loratune.exporting.adapter_matrices import Replaced
from loratune.exporting.adapters.algebra import effective_rank, inner_product, norm, singular_values
from loratune.exporting.adapters.folder import Adapter, num_parameters, read_folder
from loratune.exporting.merge_weights import DTYPES, MergedWeights, copy_companions, write_merged
from loratune.exporting.staging import atomic_folder, check_target
from loratune.exporting.weights_proof import prove_adapter, prove_weights
from loratune.exporting.written_tensors import FolderTensors
from loratune.model.safetensors_headers import weight_files_of
from loratune.run.errors import RunError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.adapters.base import base_folder, biases_of, fingerprint, require_one_base, required_base

if TYPE_CHECKING:
    from loratune.exporting.adapter_matrices import LowRank
    from loratune.run.directory import Record


def inspect_adapter(folder: str | Path, *, base: str | Path | None = None) -> Record:
    """Return what an adapter is: type, base, and rank, scale, norm and effective rank of each matrix's update."""
    adapter = read_folder(Path(folder).expanduser())
    place = base_folder([adapter], base)
    return {
        "adapter": str(adapter.path),
        "kind": adapter.kind,
        "base": adapter.base_name,
        "base_sha256": None if place is None else fingerprint(place),
        "num_parameters": num_parameters(adapter),
        "matrices": [_matrix(module, update) for module, update in adapter.updates.items()],
        "other": sorted({*adapter.biases, *adapter.whole, *(f"{name}.bias" for name in adapter.added_biases)}),
    }


def merge_adapter(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    progress: Progress = NO_PROGRESS,
) -> Record:
    """Write base and adapter as one folder of safetensors, and prove its weights.

    Args:
        folder: The adapter, DoRA included.
        out: The folder to write.
        base: The base's folder, where the adapter does not name one that is here.
        dtype: float32, bfloat16, float16, or `auto`: that of the base's files.
        progress: Receives lines and warnings.

    Raises:
        RecipeError: The base is not here, or `out` exists.
        RunError: The written weights are not those of base and adapter.
    """
    adapter = read_folder(Path(folder).expanduser())
    place = required_base(adapter, base)
    target = Path(out)
    check_target(target, needed_bytes=sum(file.stat().st_size for file in weight_files_of(place)))
    replaced = _replaced(adapter, place)
    with atomic_folder(target) as temporary:
        progress.line(f"merging {len(adapter.updates)} matrices in float32")
        write_merged(
            place, adapter.updates, temporary, dtype=None if dtype == "auto" else DTYPES[dtype], replaced=replaced
        )
        for path in place.iterdir():  # a stranger's adapter may lack tokenizer and template
            wanted = path.suffix in (".json", ".jinja", ".model", ".txt") and ".index." not in path.name
            if wanted and path.name != "config.json":
                shutil.copyfile(path, temporary / path.name)
        copy_companions(place, adapter.path, temporary, ())
        proof = _prove_merged(adapter, place, temporary, replaced)
        if proof["problems"]:
            raise RunError(f"the merged weights differ: {'; '.join(proof['problems'])}", file=target)
    return {"folder": str(target.absolute()), **proof}


def certify_adapter(
    folder: str | Path, target: str | Path, *, base: str | Path | None = None, progress: Progress = NO_PROGRESS
) -> Record:
    """Compare a merged folder, or another adapter's folder, with an adapter on its base, tensor by tensor."""
    adapter, path = read_folder(Path(folder).expanduser()), Path(target).expanduser()
    progress.line(f"comparing {len(adapter.updates)} matrices")
    if (path / "adapter_config.json").is_file():
        other = read_folder(path)
        proof = prove_adapter(adapter.updates, other.updates, adapter.whole, other.whole)
        proof["problems"] += [
            f"biases differ: {name}"
            for one, two in ((adapter.biases, other.biases), (adapter.added_biases, other.added_biases))
            for name in sorted({*one, *two})
            if name not in one or name not in two or not one[name].allclose(two[name], rtol=2**-8)
        ]
        return {"folder": str(path.absolute()), **_proof(proof)}
    place = required_base(adapter, base)
    return {"folder": str(path.absolute()), **_prove_merged(adapter, place, path, _replaced(adapter, place))}


def diff_adapters(one: str | Path, other: str | Path) -> Record:
    """Compare the updates of two adapters of one base: relative difference and angle, for each matrix and in all."""
    first, second = (read_folder(Path(folder).expanduser()) for folder in (one, other))
    for adapter in (first, second):
        adapter.require_plain("diff")
    require_one_base([first, second], None)
    squares = [{module: norm(update) ** 2 for module, update in adapter.updates.items()} for adapter in (first, second)]
    both = sorted(first.updates.keys() & second.updates.keys())
    products = {module: inner_product(first.updates[module], second.updates[module]) for module in both}
    rows = [
        {"name": module, **_difference(squares[0][module], squares[1][module], products[module])} for module in both
    ]
    return {
        **_difference(sum(squares[0].values()), sum(squares[1].values()), sum(products.values())),
        "only_first": sorted(first.updates.keys() - second.updates.keys()),
        "only_second": sorted(second.updates.keys() - first.updates.keys()),
        "matrices": rows,
    }


def _difference(first: float, second: float, product: float) -> Record:
    """Return the relative difference and the cosine of two updates, from their squared norms and inner product."""
    off = math.sqrt(max(0.0, first + second - 2 * product))
    sizes = math.sqrt(first * second)
    return {
        "relative_difference": off / math.sqrt(first) if first else (0.0 if not off else math.inf),
        "cosine": min(1.0, product / sizes) if sizes else 0.0,
    }


def _matrix(module: str, update: LowRank) -> Record:
    values = singular_values(update)
    squares = values.square().cumsum(0)
    enough = int((squares < 0.99 * squares[-1]).sum()) + 1 if float(squares[-1]) else 0
    return {
        "name": module,
        "rank": update.rank,
        "scale": update.scale,
        "norm": norm(update),
        "effective_rank": effective_rank(values),
        "rank_of_99_percent": enough,
    }


def _replaced(adapter: Adapter, base: Path) -> dict[str, Replaced]:
    """Return what an adapter replaces in its base as a whole: tensors, biases, and biases that it adds to."""
    found = {**adapter.whole, **{name: Replaced(values=tensor) for name, tensor in adapter.biases.items()}}
    added = {f"{module}.bias": tensor for module, tensor in adapter.added_biases.items()}
    named = Adapter(path=adapter.path, config={}, updates={}, biases=added)
    own = {**biases_of(base, [named]), **adapter.biases}
    return {**found, **{name: Replaced(values=own[name].float() + tensor) for name, tensor in added.items()}}


def _prove_merged(adapter: Adapter, base: Path, folder: Path, replaced: dict[str, Replaced]) -> Record:
    """Compare a merged folder with base and adapter, tensor by tensor."""
    tied = bool(AutoConfig.from_pretrained(base).get_text_config().tie_word_embeddings)
    with (
        MergedWeights(base, adapter.updates, replaced=replaced) as weights,
        FolderTensors(folder, tied=tied) as written,
    ):
        proof = prove_weights(weights, written, base_name=str(base))
    if proof is None:
        raise RunError("the files hold no tensor of the base, or one of an unknown type", file=folder)
    return _proof(proof)


def _proof(proof: Record) -> Record:
    """Return the verdict on a proof by weights."""
    kept = {name: proof[name] for name in ("kept", "relative_error", "types", "problems")}
    return {"verdict": "different" if proof["problems"] else "same", **kept}
