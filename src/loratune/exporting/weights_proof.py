"""The proof by weights: what an export's tensors say about the adapter, tensor by tensor, exactly, without any data.

For each tensor, in float32: B, the base's values in training; D, the update that was trained; W, what was written; and
round(x), x rounded to the type it was written in. A right export has W = round(B + D) where the adapter changes a
tensor and W = round(B) elsewhere. One that dropped the update has W = round(B), so the proof measures W on the way from
round(B) to round(B + D); how much of D is left of that way is the rounding's doing, not the export's.

The update is computed here by its own formula, not by the merge's, so that a mistake in one does not hide in the other.
One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch

from loratune.exporting.adapter_matrices import LowRank, Replaced

if TYPE_CHECKING:
    from loratune.exporting.merge_weights import MergedWeights
    from loratune.run.directory import Record

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""Rounds float32 values to the type that they are written in; returns float32."""

MOST_DEVIATION = 0.25
"""The largest deviation of a right tensor from the rounded update, as a fraction of it. A dropped update has 1, half an
update 0.5 or more; libraries that add in 16 bits, and so round twice, stay below 0.2."""

RELATIVE_ERROR = 1e-6
"""The largest relative error of values that are written in float32, some roundings after each other."""

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}

_EXPORT_AGAIN = "export again; check that the copy is complete"
_OTHER_BASE = "merge into the base that the run was trained on"
_OTHER_UPDATE = "merge again with `loratune merge`, which adds this run's adapter to every matrix that it changes"


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


@dataclass(slots=True, kw_only=True)
class _Sums:
    """Totals over all tensors, and the names of those that are not right."""

    update: float = 0.0
    error: float = 0.0
    kept: float = 0.0
    least_kept: tuple[float, str] | None = None
    deviation: tuple[float, str] = (0.0, "")
    changed: int = 0
    unchanged: int = 0
    types: set[str] = field(default_factory=set)
    foreign: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    infinite: list[str] = field(default_factory=list)


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
        The record of the proof; None if the export's tensors have other names or an unknown type.
    """
    sums = _Sums()
    found = {name: written.find(name) for name in intended.names}
    if not any(found.values()):
        return None
    for name, stored in found.items():
        if stored is None:
            # Old checkpoints store what the configuration says.
            sums.missing += [] if name.endswith("rotary_emb.inv_freq") else [name]
            continue
        values, rounding, kind = written.read(stored)
        if rounding is None:
            return None
        sums.types.add(kind)
        _compare(sums, name, intended, values, partial(_arrange, written, stored), rounding, kind)
    extra = sorted(set(written.names()) - set(found.values()))
    return _record(sums, _problems(sums, extra, base_name))


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
    sums = _Sums(missing=sorted(names - others))
    sums.types |= {_CODES.get(update.dtype, str(update.dtype)) for update in written.values()}
    for name in sorted(wanted.keys() & written.keys()):
        one, other = wanted[name], written[name]
        if (other.b.shape[0], other.a.shape[1]) != (one.b.shape[0], one.a.shape[1]):
            sums.changed += 1
            sums.other.append(name)
            continue
        product, found = (each.scale * (each.b.double() @ each.a.double()) for each in (one, other))
        size = _norm(product)
        # Each factor is rounded once, and what they share may cancel in their product.
        most = 2 * _relative_error(other.dtype) * abs(one.scale) * _norm(one.b.abs() @ one.a.abs()) / (size or 1.0)
        _add(sums, name, base=torch.zeros_like(product), trained=product, rounded=product, values=found, most=most)
        if not same_values(one.magnitude, other.magnitude, other.dtype):
            sums.other.append(name)
    for name in sorted(replaced.keys() & written_replaced.keys()):
        sums.changed += 1
        if replaced[name].rows != written_replaced[name].rows or not same_values(
            replaced[name].values, written_replaced[name].values
        ):
            sums.other.append(name)
    return _record(sums, _problems(sums, sorted(others - names), ""))


def same_values(one: torch.Tensor | None, other: torch.Tensor | None, dtype: torch.dtype | None = None) -> bool:
    """Tell whether values are others, as far as the type rounds that they are written in.

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


def _relative_error(dtype: torch.dtype) -> float:
    """Return how far rounding to a type may move a value: its unit roundoff, as a share of the rounded value."""
    return max(RELATIVE_ERROR, 1.01 * torch.finfo(dtype).eps / 2)


def _arrange(written: WrittenTensors, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return written.arranged(name, tensor.float())


def _compare(
    sums: _Sums,
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
    _add(sums, name, base=rounding(base), trained=trained, rounded=rounded, values=values, exact=base)
    if isinstance(update, Replaced) and not update.added and not _is_rounded(values, trained, rounded, kind):
        sums.other += [] if name in (*sums.other, *sums.dropped) else [name]


def _is_rounded(values: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor, kind: str) -> bool:
    """Tell whether values were written to which nothing was added: each as its type rounds it, if that is a float."""
    if kind in _CODES.values():
        return torch.allclose(values, rounded, rtol=RELATIVE_ERROR, atol=torch.finfo(torch.float32).smallest_normal)
    # The margin is for the ties of other quantizers.
    return _norm(values - rounded) <= MOST_DEVIATION * max(_norm(rounded - exact), RELATIVE_ERROR * _norm(exact))


def _add(
    sums: _Sums,
    name: str,
    *,
    base: torch.Tensor,
    trained: torch.Tensor,
    rounded: torch.Tensor,
    values: torch.Tensor,
    exact: torch.Tensor | None = None,
    most: float = MOST_DEVIATION,
) -> None:
    """Add one changed tensor to the totals.

    Args:
        sums: The totals.
        name: The tensor's name.
        base: The base's values, rounded to the written type.
        trained: Base and update, not rounded.
        rounded: Base and update, rounded to the written type: what should have been written.
        values: What was written.
        exact: The base's values, not rounded; None if `base` is.
        most: The largest deviation of a right tensor, as a fraction of the update.
    """
    update = trained - (base if exact is None else exact)
    size = _norm(update)
    sums.changed += 1
    if size == 0:  # the adapter was never trained here
        sums.other += [] if _norm(values - rounded) <= 1e-6 * _norm(rounded) else [name]
        return
    kept = float((values - base).double().flatten() @ update.double().flatten())
    sums.update += size**2
    sums.error += _norm(values - trained) ** 2
    sums.kept += kept
    share = kept / size**2
    if sums.least_kept is None or share < sums.least_kept[0]:
        sums.least_kept = (share, name)
    way = _norm(rounded - base)
    off = _norm(values - rounded)
    deviation = off / way if way else (0.0 if off == 0 else off / size)
    if deviation > sums.deviation[0]:
        sums.deviation = (deviation, name)
    if deviation > most:
        gone = way > 0 and _norm(values - base) <= MOST_DEVIATION * way
        (sums.dropped if gone else sums.other).append(name)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _problems(sums: _Sums, extra: Sequence[str], base_name: str) -> dict[str, str]:
    """Return what is wrong, in words → what to do about it."""
    problems = {}
    if sums.missing:
        problems[f"{_count(sums.missing, sums)} are missing (the first: {sums.missing[0]})"] = _EXPORT_AGAIN
    if extra:
        problems[f"it holds {extra[0]}, which base and adapter do not have"] = _EXPORT_AGAIN
    if sums.infinite:
        found = f"{_count(sums.infinite, sums)} hold values that are not finite (the first: {sums.infinite[0]})"
        problems[found] = _EXPORT_AGAIN
    if sums.foreign:
        found = (
            f"{len(sums.foreign)} of {sums.unchanged} tensors that the adapter does not change are not those of "
            f"{base_name} (the first: {sums.foreign[0]})"
        )
        problems[found] = _OTHER_BASE
    if sums.dropped:
        found = f"{len(sums.dropped)} of {sums.changed} matrices lack their update (the first: {sums.dropped[0]})"
        problems[found] = _OTHER_UPDATE
    if sums.other:
        found = f"{len(sums.other)} of {sums.changed} matrices hold another update than the adapter's (the first: "
        problems[f"{found}{sums.other[0]})"] = _OTHER_UPDATE
    return problems


def _count(names: Sequence[str], sums: _Sums) -> str:
    return f"{len(names)} of {sums.changed + sums.unchanged + len(sums.missing)} tensors"


def _record(sums: _Sums, problems: Mapping[str, str]) -> Record:
    kept, least = (sums.kept / sums.update, sums.least_kept) if sums.update else (1.0, None)
    return {
        "num_changed": sums.changed,
        "num_unchanged": sums.unchanged,
        "types": sorted(sums.types),
        "relative_error": (sums.error / sums.update) ** 0.5 if sums.update else 0.0,
        "kept": kept,
        "least_kept": least[0] if least else 1.0,
        "least_kept_tensor": least[1] if least else None,
        "largest_deviation": sums.deviation[0],
        "problems": list(problems),
        "fixes": list(problems.values()),
    }
