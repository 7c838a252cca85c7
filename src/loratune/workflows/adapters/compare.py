"""Inspect adapters, compare them with each other, and merge them into their base."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loratune.exporting.adapter_matrices import Replaced
from loratune.exporting.adapters.algebra import effective_rank, inner_product, norm, singular_values
from loratune.exporting.adapters.folder import MERGEABLE, Adapter, num_parameters, read_folder
from loratune.exporting.merge_weights import DTYPES, MergedWeights, copy_companions, write_merged
from loratune.exporting.staging import atomic_folder, check_target
from loratune.exporting.weights_proof import prove_adapter, prove_weights, same_values
from loratune.exporting.written_tensors import FolderTensors
from loratune.model.safetensors_headers import stored_name, weight_files_of
from loratune.model.weight_facts import has_own_head, is_end_of_model
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.adapters.base import biases_of, checked_base, fingerprint, is_tied, required_base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.exporting.adapter_matrices import LowRank
    from loratune.run.directory import Record


_CLASSIFIER_HEADS = ("score.weight", "classifier.weight")


def inspect_adapter(folder: str | Path, *, base: str | Path | None = None) -> Record:
    """Return what an adapter is: type, base, and rank, scale, norm and effective rank of each matrix's update."""
    adapter = read_folder(Path(folder).expanduser())
    place = checked_base([adapter], base)
    return {
        "adapter": str(adapter.path),
        "kind": adapter.kind,
        "base": adapter.base_name,
        "base_sha256": None if place is None else fingerprint(place),
        "num_parameters": num_parameters(adapter.path),
        "matrices": [_matrix(module, update) for module, update in adapter.updates.items()],
        "other": sorted(
            {*adapter.biases, *adapter.whole, *adapter.stacks, *(f"{name}.bias" for name in adapter.added_biases)}
        ),
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
        RecipeError: The base is not here or not the adapter's, together they are not one model, or `out` exists.
        RunError: The written weights are not those of base and adapter.
    """
    adapter = read_folder(Path(folder).expanduser())
    adapter.require_plain("merge", allowed=MERGEABLE)
    place = required_base(adapter, base, progress)
    target = Path(out).expanduser()
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
    if proof["verdict"] == "undecided":
        types = " and ".join(proof["types"])
        progress.warn(f"rounding to {types} left nothing of the update: --dtype float32 keeps it")
    return {"folder": str(target.absolute()), **proof}


def certify_adapter(
    folder: str | Path, target: str | Path, *, base: str | Path | None = None, progress: Progress = NO_PROGRESS
) -> Record:
    """Compare a merged folder, or another adapter's folder, with an adapter on its base, tensor by tensor.

    Raises:
        RecipeError: The base is not the adapters', or they contain more than these comparisons cover.
    """
    adapter, path = read_folder(Path(folder).expanduser()), Path(target).expanduser()
    adapter.require_plain("certify", allowed=MERGEABLE)
    progress.line(f"comparing {len(adapter.updates)} matrices")
    if (path / "adapter_config.json").is_file():
        other = read_folder(path)
        other.require_plain("certify", allowed=MERGEABLE)
        checked_base([adapter, other], base, progress)
        proof = prove_adapter(adapter.updates, other.updates, adapter.whole, other.whole)
        proof["problems"] += [f"biases differ: {name}" for name in _other_biases(adapter, other)]
        return {"folder": str(path.absolute()), **_proof(proof, adapter)}
    place = required_base(adapter, base, progress)
    return {"folder": str(path.absolute()), **_prove_merged(adapter, place, path, _replaced(adapter, place))}


def diff_adapters(one: str | Path, other: str | Path, *, base: str | Path | None = None) -> Record:
    """Compare the updates of two adapters of one base: relative difference and angle, for each matrix and in all."""
    first, second = (read_folder(Path(folder).expanduser()) for folder in (one, other))
    for adapter in (first, second):
        adapter.require_plain("diff")
    checked_base([first, second], base)
    squares = [{module: norm(update) ** 2 for module, update in adapter.updates.items()} for adapter in (first, second)]
    both = sorted(first.updates.keys() & second.updates.keys())
    products = {module: inner_product(first.updates[module], second.updates[module]) for module in both}
    rows = [
        {"name": module, **_difference(squares[0][module], squares[1][module], products[module])} for module in both
    ]
    return {
        **_difference(sum(squares[0].values()), sum(squares[1].values()), sum(products.values())),
        "only_first": sorted({*first.updates, *_values(first)} - {*second.updates, *_values(second)}),
        "only_second": sorted({*second.updates, *_values(second)} - {*first.updates, *_values(first)}),
        "matrices": rows,
        "others": [
            {"name": name, **_difference(*(float((x * y).sum()) for x, y in ((a, a), (b, b), (a, b))))}
            for name, a, b in _shared_values(first, second)
        ],
    }


def _difference(first: float, second: float, product: float) -> Record:
    """Return the relative difference and the cosine of two updates, from their squared norms and inner product."""
    off = math.sqrt(max(0.0, first + second - 2 * product))
    sizes = math.sqrt(first * second)
    return {
        "relative_difference": off / math.sqrt(first) if first else (None if off else 0.0),
        "cosine": max(-1.0, min(1.0, product / sizes)) if sizes else 0.0,
    }


def _values(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return what an adapter holds beside its matrices: biases, what it adds to biases, and whole tensors."""
    return {
        **{name: item.values for name, item in adapter.whole.items()},
        **adapter.biases,
        **{f"{module}.lora_B.bias": tensor for module, tensor in adapter.added_biases.items()},
    }


def _shared_values(one: Adapter, other: Adapter) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield what two adapters both hold beside their matrices, in float64.

    Raises:
        RecipeError: The shapes of one differ.
    """
    first, second = _values(one), _values(other)
    for name in sorted(first.keys() & second.keys()):
        if first[name].shape != second[name].shape:
            raise RecipeError(
                f"{name} is {tuple(second[name].shape)}, and {tuple(first[name].shape)} in the other adapter",
                file=other.path,
                fix="compare adapters of one base",
            )
        yield name, first[name].double(), second[name].double()


def _other_biases(one: Adapter, other: Adapter) -> list[str]:
    """Return the biases in which two adapters differ."""
    found = [
        name
        for name in sorted({*one.biases, *other.biases})
        if not same_values(one.biases.get(name), other.biases.get(name))
    ]
    for module in sorted({*one.added_biases, *other.added_biases}):
        added = [each.added_biases.get(module, torch.zeros(1)) for each in (one, other)]
        sizes = max(tensor.numel() for tensor in added)
        kind = other.updates[module].dtype if module in other.updates else None
        if not same_values(added[0].expand(sizes), added[1].expand(sizes), kind):
            found.append(f"{module}.lora_B.bias")
    return found


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
    """Return what an adapter replaces in its base as a whole: tensors, biases, and biases that it adds to.

    Raises:
        RecipeError: The base has no such tensor, or it is the same as another one.
    """
    _require_one_matrix(adapter, base)
    with MergedWeights(base, {}) as weights:
        names = weights.names
    head = next((name for name in adapter.whole if name in _CLASSIFIER_HEADS and not stored_name(name, names)), None)
    if head is not None:
        raise RecipeError(
            f"the adapter trains a classifier's head ({head}), which is not in the base's files",
            file=adapter.path,
            fix="`loratune merge RUN OUT`; or PEFT: AutoPeftModelForSequenceClassification.from_pretrained(ADAPTER, "
            "num_labels=N).merge_and_unload()",
        )
    found = {**adapter.whole, **{name: Replaced(values=tensor) for name, tensor in adapter.biases.items()}}
    added = {f"{module}.bias": tensor for module, tensor in adapter.added_biases.items()}
    own = {**biases_of(base, set(added)), **adapter.biases}
    if missing := sorted(added.keys() - own.keys()):
        raise RecipeError(
            f"the adapter adds a bias (lora_bias) to {missing[0].removesuffix('.bias')}, which has none in the base: "
            "no model of the base's architecture holds both",
            file=adapter.path,
            fix="serve base and adapter with PEFT, without merging",
        )
    sums = {name: Replaced(values=own[name].float() + tensor, added=True) for name, tensor in added.items()}
    return {**found, **sums}


def _require_one_matrix(adapter: Adapter, base: Path) -> None:
    """Refuse an adapter that changes only one of embedding and head, where the base has one matrix for both."""
    if not is_tied(base) or has_own_head(base):
        return
    changed = {**adapter.whole, **{f"{module}.weight": update for module, update in adapter.updates.items()}}
    ends = [(name, item) for name, item in changed.items() if is_end_of_model(name)]
    rows = [item.rows if isinstance(item, Replaced) else None for _, item in ends]
    if not ends or adapter.config.get("ensure_weight_tying"):
        return
    if len(ends) == 1:  # PEFT gives the head the rows of tokens of the embedding, and no more
        tied = rows[0] is not None and ends[0][0].endswith("embed_tokens.weight")
    else:
        values = [item.values for _, item in ends if isinstance(item, Replaced)]
        tied = len(values) == len(ends) == 2 and rows[0] == rows[1] and torch.equal(*values)
    if not tied:
        raise RecipeError(
            f"the adapter changes {ends[0][0]} by itself, which is one of two uses of one matrix in the base "
            "(tie_word_embeddings)",
            file=adapter.path,
            fix="train with ensure_weight_tying=True; or untie the base first, save it, and train on that",
        )


def _prove_merged(adapter: Adapter, base: Path, folder: Path, replaced: dict[str, Replaced]) -> Record:
    """Compare a merged folder with base and adapter, tensor by tensor."""
    with (
        MergedWeights(base, adapter.updates, replaced=replaced) as weights,
        FolderTensors(folder, tied=is_tied(base)) as written,
    ):
        proof = prove_weights(weights, written, base_name=str(base))
    if proof is None:
        raise RunError("the files hold no tensor of the base, or one of an unknown type", file=folder)
    return _proof(proof, adapter)


def _proof(proof: Record, adapter: Adapter) -> Record:
    """Return the verdict on a proof by weights."""
    kept = {name: proof[name] for name in ("kept", "relative_error", "types", "problems")}
    # Where rounding leaves nothing of the update, the base alone is written as base and adapter are.
    seen = proof["least_kept_tensor"] is not None or not any(map(norm, adapter.updates.values()))
    kept |= {} if seen else {"kept": 0.0}
    found = "same" if kept["kept"] else "undecided"
    return {"verdict": "different" if proof["problems"] else found, **kept}
