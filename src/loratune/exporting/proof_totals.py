"""The totals of a proof by weights: what all tensors together show, and which of them are wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratune.exporting.quantized_proof import HeldShare
    from loratune.run.directory import Record

MOST_DEVIATION = 0.25
"""The largest deviation of a right tensor from the rounded update, as a fraction of it. A dropped update has 1, half an
update 0.5 or more; libraries that add in 16 bits, and so round twice, stay below 0.2."""

_EXPORT_AGAIN = "export again; check that the copy is complete"
_OTHER_BASE = "merge into the base that the run was trained on"
_OTHER_UPDATE = "merge again with `loratune merge`, which adds this run's adapter to every matrix that it changes"


@dataclass(slots=True, kw_only=True)
class Sums:
    """Totals over all tensors, and the names of those that are wrong."""

    update: float = 0.0
    error: float = 0.0
    kept: float = 0.0
    unproven: float = 0.0
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


def add_tensor(
    sums: Sums,
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
    size = norm_of(update)
    sums.changed += 1
    if size == 0:  # the adapter was never trained here
        sums.other += [] if norm_of(values - rounded) <= 1e-6 * norm_of(rounded) else [name]
        return
    kept = float((values - base).double().flatten() @ update.double().flatten())
    sums.update += size**2
    sums.error += norm_of(values - trained) ** 2
    sums.kept += kept
    share = kept / size**2
    if sums.least_kept is None or share < sums.least_kept[0]:
        sums.least_kept = (share, name)
    way = norm_of(rounded - base)
    off = norm_of(values - rounded)
    deviation = off / way if way else (0.0 if off == 0 else off / size)
    if deviation > sums.deviation[0]:
        sums.deviation = (deviation, name)
    if deviation > most:
        gone = way > 0 and norm_of(values - base) <= MOST_DEVIATION * way
        (sums.dropped if gone else sums.other).append(name)


def add_held(sums: Sums, name: str, held: HeldShare, size: float, *, on_grid: bool) -> bool:
    """Add the share of its update found in a quantized matrix. Return whether that differs from the update.

    Args:
        sums: The totals.
        name: The matrix's name.
        held: What it holds.
        size: The norm of its update.
        on_grid: Whether the base's values were quantized before, so that a right quantizer may lose the update.
    """
    sums.update += size**2
    lost_by_rounding = on_grid and held.share < 1 - MOST_DEVIATION
    if lost_by_rounding or held.chance > 1 - MOST_DEVIATION:  # a lost update would pass as well
        sums.unproven += size**2
        return False
    sums.kept += held.share * size**2
    if sums.least_kept is None or held.share < sums.least_kept[0]:
        sums.least_kept = (held.share, name)
    deviation = abs(1 - held.share)
    if deviation > sums.deviation[0]:
        sums.deviation = (deviation, name)
    if deviation <= MOST_DEVIATION + held.chance:
        return False
    gone = abs(held.share) <= MOST_DEVIATION + held.chance
    (sums.dropped if gone else sums.other).append(name)
    return True


def norm_of(tensor: torch.Tensor) -> float:
    """Return the Euclidean norm over all values, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def problems_of(sums: Sums, extra: Sequence[str], base_name: str) -> dict[str, str]:
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
        found = f"{len(sums.other)} of {sums.changed} matrices have a different update than the adapter's (the first: "
        problems[f"{found}{sums.other[0]})"] = _OTHER_UPDATE
    return problems


def _count(names: Sequence[str], sums: Sums) -> str:
    return f"{len(names)} of {sums.changed + sums.unchanged + len(sums.missing)} tensors"


def totals_record(sums: Sums, problems: Mapping[str, str]) -> Record:
    proven = sums.update - sums.unproven
    kept, least = (sums.kept / proven, sums.least_kept) if proven else (1.0, None)
    return {
        "num_changed": sums.changed,
        "num_unchanged": sums.unchanged,
        "types": sorted(sums.types),
        "relative_error": (sums.error / sums.update) ** 0.5 if sums.update else 0.0,
        "kept": kept,
        "unproven": sums.unproven / sums.update if sums.update else 0.0,
        "least_kept": least[0] if least else 1.0,
        "least_kept_tensor": least[1] if least else None,
        "largest_deviation": sums.deviation[0],
        "problems": list(problems),
        "fixes": list(problems.values()),
    }
