"""The proof by weights: what an export's tensors say about the adapter, tensor by tensor, exactly, without any data.

For each tensor, in float32: B, the base's values in training; D, the update that was trained; W, what was written; and
round(x), x rounded to the type it was written in. A right export has W = round(B + D) where the adapter changes a
tensor and W = round(B) elsewhere. One that dropped the update has W = round(B), so the proof measures W on the way from
round(B) to round(B + D); how much of D is left of that way is the rounding's doing, not the export's.

The update is computed here by its own formula, not by the merge's, so that a mistake in one does not hide in the other.
One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch

from loratune.exporting.adapter_matrices import LowRank, Replaced
from loratune.exporting.proof_totals import (
    MOST_DEVIATION,
    Sums,
    add_held,
    add_tensor,
    norm_of,
    problems_of,
    totals_record,
)
from loratune.exporting.quantized_proof import held_share, is_on_grid, largest_noise

if TYPE_CHECKING:
    from loratune.exporting.merge_weights import MergedWeights
    from loratune.run.directory import Record

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""Rounds float32 values to the type that they are written in; returns float32."""

NamedRounding = Callable[[str, torch.Tensor], torch.Tensor]
"""Rounds the values of the model's tensor of this name."""

RELATIVE_ERROR = 1e-6
"""The largest relative error of values that are written in float32, some roundings after each other."""

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def for_all(rounding: Rounding) -> NamedRounding:
    """Return the rounding of a file whose tensors are all rounded in the same way."""
    return lambda _, values: rounding(values)


class WrittenTensors(Protocol):
    """The tensors of an export, read one at a time."""

    def find(self, name: str) -> str | None:
        """Return the name in the export of one of the model's tensors; None if the export has none."""
        ...

    def names(self) -> Iterable[str]:
        """Return all names in the export."""
        ...

    def read(self, name: str) -> tuple[torch.Tensor, Rounding | None, str]:
        """Return values in float32, how their type rounds (None if that is unknown), and the type's name."""
        ...

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the model in the export's layout; `name` is the export's."""
        ...


def trained_weight(weight: torch.Tensor, update: LowRank | Replaced) -> torch.Tensor:
    """Return a weight as training computes with it, in float32: base and update together."""
    if isinstance(update, Replaced):
        return update.applied_to(weight)
    a, b = update.a.to(weight.device), update.b.to(weight.device)
    delta = torch.einsum("or,ri->io" if update.transposed else "or,ri->oi", b, a).mul_(update.scale)
    trained = weight.float() + delta
    if update.magnitude is None:
        return trained
    along = 0 if update.transposed else 1
    factor = update.magnitude.to(weight.device) / trained.square().sum(along).sqrt()
    return trained * factor.unsqueeze(along)


def prove_weights(intended: MergedWeights, written: WrittenTensors, *, base_name: str) -> Record | None:
    """Compare an export's tensors with those of base and update.

    Args:
        intended: The base's tensors and what the adapter does to each.
        written: The export's tensors.
        base_name: The base, for messages.

    Returns:
        The record of the proof; None if the export's tensors have other names, or a type whose errors are unknown.
    """
    sums = Sums()
    found = {name: written.find(name) for name in intended.names}
    if not any(found.values()):
        return None
    for name, stored in found.items():
        if stored is None:
            # Old checkpoints store what the configuration says.
            sums.missing += [] if name.endswith("rotary_emb.inv_freq") else [name]
            continue
        values, rounding, kind = written.read(stored)
        sums.types.add(kind)
        arranged = partial(_arrange, written, stored)
        if rounding is not None:
            _compare(sums, name, intended, values, arranged, rounding, kind)
        elif not _compare_quantized(sums, name, intended, values, arranged, kind):
            return None
    extra = sorted(set(written.names()) - set(found.values()))
    return totals_record(sums, problems_of(sums, extra, base_name))


def prove_adapter(
    wanted: Mapping[str, LowRank],
    written: Mapping[str, LowRank],
    replaced: Mapping[str, Replaced] = MappingProxyType({}),
    written_replaced: Mapping[str, Replaced] = MappingProxyType({}),
) -> Record:
    """Compare the updates of a written adapter with the run's, as products of their matrices.

    They are the same within what the roundings of A and B to the type of their file explain.

    Args:
        wanted: Module name → the run's update.
        written: The same of the written adapter.
        replaced: Tensor name → the values that the run's adapter replaces it with.
        written_replaced: The same of the written adapter.
    """
    names, others = {*wanted, *replaced}, {*written, *written_replaced}
    sums = Sums(missing=sorted(names - others))
    sums.types |= {_CODES.get(update.dtype, str(update.dtype)) for update in written.values()}
    for name in sorted(wanted.keys() & written.keys()):
        one, other = wanted[name], written[name]
        if (other.b.shape[0], other.a.shape[1]) != (one.b.shape[0], one.a.shape[1]):
            sums.changed += 1
            sums.other.append(name)
            continue
        product, found = (each.scale * (each.b.double() @ each.a.double()) for each in (one, other))
        size = norm_of(product)
        # Each factor is rounded once, and what they share may cancel in their product.
        most = 2 * _relative_error(other.dtype) * abs(one.scale) * norm_of(one.b.abs() @ one.a.abs()) / (size or 1.0)
        add_tensor(
            sums, name, base=torch.zeros_like(product), trained=product, rounded=product, values=found, most=most
        )
        if not same_values(one.magnitude, other.magnitude, other.dtype):
            sums.other.append(name)
    for name in sorted(replaced.keys() & written_replaced.keys()):
        sums.changed += 1
        if replaced[name].rows != written_replaced[name].rows or not same_values(
            replaced[name].values, written_replaced[name].values
        ):
            sums.other.append(name)
    return totals_record(sums, problems_of(sums, sorted(others - names), ""))


def same_values(one: torch.Tensor | None, other: torch.Tensor | None, dtype: torch.dtype | None = None) -> bool:
    """Tell whether values differ by more than the rounding of the type in which they are written.

    Args:
        one: The values as they should be.
        other: What was written.
        dtype: The type in its file; None for its own.
    """
    if one is None or other is None:
        return one is other
    dtype = dtype or other.dtype
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=_relative_error(dtype), atol=smallest
    )


def with_base(adapter: Record, base: Record | None) -> Record:
    """Return the proof of an adapter with that of the base written next to it."""
    if base is None:
        return adapter
    both = {key: [*adapter[key], *base[key]] for key in ("problems", "fixes")}
    return {**adapter, **both, "num_unchanged": adapter["num_unchanged"] + base["num_unchanged"]}


def _relative_error(dtype: torch.dtype) -> float:
    """Return how far rounding to a type may move a value: its unit roundoff, as a share of the rounded value."""
    return max(RELATIVE_ERROR, 1.01 * torch.finfo(dtype).eps / 2)


def _arrange(written: WrittenTensors, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return written.arranged(name, tensor.float())


def _compare(
    sums: Sums,
    name: str,
    intended: MergedWeights,
    values: torch.Tensor,
    arranged: Callable[[torch.Tensor], torch.Tensor],
    rounding: Rounding,
    kind: str,
) -> None:
    """Compare one tensor with what it should be."""
    weight, update = intended.base(name), intended.update(name)
    if not weight.is_floating_point():
        sums.unchanged += 1
        sums.foreign += [] if torch.equal(values, weight.float()) else [name]
        return
    base = arranged(weight)
    if update is None:
        sums.unchanged += 1
        if values.shape != base.shape:
            sums.foreign.append(name)
            return
        rounded = rounding(base)
        held = base.isfinite() & rounded.isfinite()  # a base may have NaN where no token ever reads
        if bool(base.isfinite().all()) and not bool(values.isfinite().all()):
            sums.infinite.append(name)
        elif not torch.equal(values.isfinite(), held) or not _is_rounded(values[held], base[held], rounded[held], kind):
            sums.foreign.append(name)
        return
    trained = arranged(trained_weight(weight, update))
    if values.shape != trained.shape or not bool(values.isfinite().all()):
        sums.changed += 1
        (sums.other if values.shape != trained.shape else sums.infinite).append(name)
        return
    if base.shape != trained.shape:  # new rows
        grown = trained.new_zeros(trained.shape)
        grown[: base.shape[0]] = base
        base = grown
    rounded = rounding(trained)
    add_tensor(sums, name, base=rounding(base), trained=trained, rounded=rounded, values=values, exact=base)
    if isinstance(update, Replaced) and not update.added and not _is_rounded(values, trained, rounded, kind):
        sums.other += [] if name in (*sums.other, *sums.dropped) else [name]


def _compare_quantized(
    sums: Sums,
    name: str,
    intended: MergedWeights,
    values: torch.Tensor,
    arranged: Callable[[torch.Tensor], torch.Tensor],
    kind: str,
) -> bool:
    """Compare one tensor whose rounding only its quantizer knows. Return whether it can be compared."""
    weight, update = intended.base(name), intended.update(name)
    trained = arranged(weight if update is None else trained_weight(weight, update))
    most = largest_noise(kind, trained)
    if most is None:
        return False
    sums.changed += update is not None
    sums.unchanged += update is None
    wrong = sums.foreign if update is None else sums.other
    if values.shape != trained.shape:
        wrong.append(name)
        return True
    if not bool(values.isfinite().all()):
        sums.infinite.append(name)
        return True
    off = norm_of(values - trained)
    base = arranged(weight)
    if update is not None and base.shape == trained.shape and (size := norm_of(trained - base)):
        sums.error += off**2
        if add_held(sums, name, held_share(values, base, trained - base), size, on_grid=is_on_grid(base)):
            return True
    if off > most:
        wrong.append(name)
    return True


def _is_rounded(values: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor, kind: str) -> bool:
    """Tell whether values were written to which nothing was added: each as its type rounds it, if that is a float."""
    if kind in _CODES.values():
        return torch.allclose(values, rounded, rtol=RELATIVE_ERROR, atol=torch.finfo(torch.float32).smallest_normal)
    # The margin is for the ties of other quantizers.
    return norm_of(values - rounded) <= MOST_DEVIATION * max(norm_of(rounded - exact), RELATIVE_ERROR * norm_of(exact))
