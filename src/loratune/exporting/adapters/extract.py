"""An adapter from a full fine-tune: what it changed in each matrix of its base, read tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loratune.exporting.adapters.algebra import approximated
from loratune.exporting.merge_weights import MergedWeights, check_not_quantized
from loratune.model.safetensors_headers import stored_name
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from loratune.exporting.adapter_matrices import LowRank
    from loratune.exporting.adapters.algebra import Discarded


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What a fine-tune changed.

    Attributes:
        updates: Module → the best approximation of its change.
        losses: Module → what the rank discards of its change.
        left_out: Tensor → the norm of its change, for tensors that are no adapted matrix: norms, embeddings, biases,
            and those that only the fine-tune has, which count as changed from zero.
    """

    updates: Mapping[str, LowRank]
    losses: Mapping[str, Discarded]
    left_out: Mapping[str, float]


def extract(
    base: Path,
    tuned: Path,
    modules: Mapping[str, bool],
    *,
    rank: int | None,
    energy: float | None,
    progress: Callable[[], None],
) -> Extracted:
    """Compare a full fine-tune with its base, one tensor in memory at a time.

    Args:
        base: The base's folder.
        tuned: The fine-tune's folder.
        modules: Linear modules by name → whether they store their weight as d_in x d_out.
        rank: The highest rank of an update; None for no limit.
        energy: The share of each change's squared norm to keep at least.
        progress: Called after each tensor.

    Raises:
        RecipeError: The two are not the same architecture, or nothing differs.
        RunError: One is quantized.
    """
    for folder in (base, tuned):
        check_not_quantized(folder)
    updates: dict[str, LowRank] = {}
    losses: dict[str, Discarded] = {}
    left_out: dict[str, float] = {}
    with MergedWeights(base, {}) as before, MergedWeights(tuned, {}) as after:
        module_of = {stored_name(f"{module}.weight", before.names): module for module in modules}
        _require_same_tensors(before, after, tuned)
        for name in before.names:
            progress()
            first = before.base(name)
            if not first.is_floating_point():
                continue
            change = after.base(stored_name(name, after.names) or name).float() - first.float()
            if not bool(change.any()):
                continue
            if not bool(change.isfinite().all()):
                raise RunError(f"{name} is not finite in one of the two", file=tuned)
            module = module_of.get(name)
            if module is None:
                left_out[name] = float(torch.linalg.vector_norm(change, dtype=torch.float64))
                continue
            transposed = modules[module]
            updates[module], losses[module] = approximated(
                change.T if transposed else change, rank=rank, energy=energy, transposed=transposed
            )
        left_out |= _only_in(after, before)
    if not updates:
        raise RecipeError("the fine-tune changed no matrix of its base", file=tuned, fix="check which folder is which")
    return Extracted(updates=updates, losses=losses, left_out=left_out)


def _only_in(after: MergedWeights, before: MergedWeights) -> dict[str, float]:
    """Return the tensors that only a fine-tune has, and the norms of their change: from zero, or from the embedding."""
    known = {stored_name(name, after.names) for name in before.names}
    embedding = stored_name("model.embed_tokens.weight", before.names)
    found: dict[str, float] = {}
    for name in after.names:
        tensor = after.base(name)
        if name in known or not tensor.is_floating_point() or name.endswith("rotary_emb.inv_freq"):  # which is computed
            continue
        if name == "lm_head.weight" and embedding is not None:  # of a base where it is the embedding
            own = before.base(embedding)
            tensor = tensor.float() - own.float() if own.shape == tensor.shape else tensor
        size = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        found |= {name: size} if size else {}
    return found


def _require_same_tensors(before: MergedWeights, after: MergedWeights, tuned: Path) -> None:
    """Refuse two models whose tensors are not the same."""
    missing = [name for name in before.names if stored_name(name, after.names) is None]
    if missing:
        raise RecipeError(f"the fine-tune has no {missing[0]}, which its base has", file=tuned, fix="name its own base")
    for name in before.names:
        shapes = before.shape(name), after.shape(stored_name(name, after.names) or name)
        if shapes[0] != shapes[1]:
            raise RecipeError(
                f"{name} is {shapes[1]} in the fine-tune and {shapes[0]} in the base",
                file=tuned,
                fix="name its own base",
            )
