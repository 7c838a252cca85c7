"""Sums, sizes and approximations of low-rank updates, without building an update if its factors suffice.

    <B·A, B'·A'> = Σ (Bᵀ·B') ∘ (A·A'ᵀ)                     r × r' products instead of d_out × d_in ones
    B = Q·R, Aᵀ = Q'·R'   →   the singular values of B·A are those of R·R'ᵀ

DoRA is not a low-rank update: its magnitudes scale full rows of base and update together. Nothing here accepts it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loratune.exporting.adapter_matrices import LowRank

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Discarded:
    """What an approximation of an update leaves out.

    Attributes:
        share: The share of the squared norm, 0 to 1.
        squared_norm: The squared norm of what was approximated.
    """

    share: float
    squared_norm: float


def discarded_share(parts: Iterable[Discarded]) -> float:
    """Return the share of the squared norm of all matrices together that is left out."""
    found = list(parts)
    total = sum(part.squared_norm for part in found)
    return sum(part.share * part.squared_norm for part in found) / total if total else 0.0


def dense(update: LowRank) -> torch.Tensor:
    """Return scale · B · A in float64, [d_out, d_in]."""
    return update.scale * (update.b.double() @ update.a.double())


def inner_product(one: LowRank, other: LowRank) -> float:
    """Return the sum of the products of all elements of two updates."""
    left, right = one.b.double().T @ other.b.double(), one.a.double() @ other.a.double().T
    return one.scale * other.scale * float((left * right).sum())


def norm(update: LowRank) -> float:
    """Return the Frobenius norm of an update."""
    return math.sqrt(max(0.0, inner_product(update, update)))


def weighted_sum(parts: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Return Σ weight · update, exactly: the concatenated factors, with scale 1 and the sum of the ranks.

    Args:
        parts: Weights and updates of the same matrix.
    """
    scaled = [(weight * update.scale * update.b.double()).float() for weight, update in parts]
    return LowRank(
        a=torch.cat([update.a for _, update in parts]),
        b=torch.cat(scaled, dim=1),
        scale=1.0,
        transposed=parts[0][1].transposed,
    )


def singular_values(update: LowRank) -> torch.Tensor:
    """Return the singular values of an update, the largest first, float64 [r]."""
    return _factors(update)[1]


def truncated(update: LowRank, *, rank: int | None, energy: float | None = None) -> tuple[LowRank, Discarded]:
    """Return the best approximation of lower rank, and what it discards.

    Args:
        update: The update.
        rank: The highest rank of the result; None for no limit.
        energy: The share of the squared norm to keep at least; None to keep all that `rank` allows.
    """
    left, values, right = _factors(update)
    kept = _kept(values, rank, energy)
    return _balanced(left, values, right, kept, update.transposed), _discarded(values, kept)


def approximated(
    matrix: torch.Tensor, *, rank: int | None, energy: float | None = None, transposed: bool = False
) -> tuple[LowRank, Discarded]:
    """Return the best approximation of a matrix [d_out, d_in] by a low-rank update, and what it discards."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = _kept(values, rank, energy)
    return _balanced(left, values, right, kept, transposed), _discarded(values, kept)


def effective_rank(values: torch.Tensor) -> float:
    """Return the exponential of the entropy of the normalized singular values (Roy & Vetterli 2007): 1 to r."""
    total = float(values.sum())
    if not total:
        return 0.0
    shares = values / total
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def _factors(update: LowRank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U, the singular values, and Vᵀ of an update, by the QR decompositions of its factors."""
    outer, one = torch.linalg.qr(update.b.double())
    inner, other = torch.linalg.qr(update.a.double().T)
    left, values, right = torch.linalg.svd(update.scale * (one @ other.T))
    size = len(values)
    return outer @ left[:, :size], values, right[:size] @ inner.T


def _kept(values: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """Return how many singular values to keep: at least one, and none that is zero to float32's digits."""
    nonzero = int((values > values[0] * 1e-7).sum()) if len(values) else 0
    kept = min(nonzero, len(values) if rank is None else rank)
    if energy is not None:
        squares = values.square().cumsum(0)
        kept = min(kept, int((squares < energy * squares[-1]).sum()) + 1)
    return max(1, kept)


def _balanced(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, kept: int, transposed: bool) -> LowRank:
    """Return the update whose two factors share the singular values evenly."""
    roots = values[:kept].sqrt()
    return LowRank(
        a=(roots[:, None] * right[:kept]).float(),
        b=(left[:, :kept] * roots).float(),
        scale=1.0,
        transposed=transposed,
    )


def _discarded(values: torch.Tensor, kept: int) -> Discarded:
    squares = values.square()
    total = float(squares.sum())
    return Discarded(float(squares[kept:].sum()) / total if total else 0.0, total)
