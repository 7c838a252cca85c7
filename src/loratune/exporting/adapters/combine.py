"""Several adapters of one base as one: exactly, or by the approximations of PEFT."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import merge_utils

from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.adapters.algebra import Discarded, approximated, dense, truncated, weighted_sum
from loratune.exporting.adapters.folder import Adapter, targets_of
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

METHODS = ("concat", "svd", "linear", "ties", "dare_linear", "dare_ties")
_OF_A_RANK = ("svd", "ties", "dare_linear", "dare_ties")
_PRUNING = ("ties", "dare_linear", "dare_ties")
_RANDOM = ("dare_linear", "dare_ties")
_DENSITY, _SEED = 0.5, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How adapters are added.

    Attributes:
        name: `concat`: exact, of the sum of the ranks; `svd`: the best approximation of it of rank `rank`; `linear`:
            A and B are added separately, as PEFT does; `ties`, `dare_linear`, `dare_ties`: PEFT's functions on the
            full updates, then as `svd`.
        rank: The rank of the result; None for the highest of the adapters'. `concat` and `linear` have none to choose.
        density: The share of elements that `ties` and `dare` keep, above 0 and at most 1; None for a half.
        seed: The seed of what `dare` drops; None for 0.

    Raises:
        RecipeError: A value is out of its range, or the method has no such setting.
    """

    name: str = "concat"
    rank: int | None = None
    density: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise RecipeError(f"--method {self.name} is unknown", fix=f"one of {', '.join(METHODS)}")
        for option, methods in (("rank", _OF_A_RANK), ("density", _PRUNING), ("seed", _RANDOM)):
            if getattr(self, option) is not None and self.name not in methods:
                raise RecipeError(
                    f"--{option} {getattr(self, option)} has no meaning for --method {self.name}",
                    fix=f"leave it out, or --method {' or '.join(methods)}",
                )
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"--rank {self.rank} is not 1 or more", fix="--rank 8")
        if self.density is not None and not 0 < self.density <= 1:
            raise RecipeError(f"--density {self.density} is not above 0 and at most 1", fix="--density 0.5")

    @property
    def used_seed(self) -> int | None:
        """The seed of the method's random numbers; None if it draws none."""
        return (_SEED if self.seed is None else self.seed) if self.name in _RANDOM else None


EXACT_SUM = Method()


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: Method = EXACT_SUM,
    base_biases: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Adapter, dict[str, Discarded]]:
    """Return Σ weight · update as one adapter, and what its rank discards of each matrix's sum.

    Args:
        adapters: Adapters of the same base.
        weights: A factor for each; any real numbers.
        method: How they are added.
        base_biases: Tensor name → the base's bias, needed if an adapter replaces biases.

    Raises:
        RecipeError: An adapter is more than updates and biases, or the method cannot take them.
    """
    _require_summable(adapters, weights)
    modules = sorted({module for adapter in adapters for module in adapter.updates})
    rank = method.rank or max(update.rank for adapter in adapters for update in adapter.updates.values())
    updates: dict[str, LowRank] = {}
    losses: dict[str, Discarded] = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density .* is greater than or equal to 1")
        torch.manual_seed(method.used_seed or 0)
        for module in modules:
            parts = [
                (weight, adapter.updates[module])
                for weight, adapter in zip(weights, adapters, strict=True)
                if module in adapter.updates
            ]
            updates[module], losses[module] = _combined(module, parts, method, rank)
    added = _sum_of_added(adapters, weights)
    result = Adapter(
        path=adapters[0].path,
        config={
            **adapters[0].config,
            "target_modules": targets_of(list(adapters), updates),
            "bias": next((adapter.config["bias"] for adapter in adapters if adapter.biases), "none"),
        },
        updates=updates,
        added_biases=added,
        biases=_sum_of_biases(adapters, weights, base_biases),
        whole=adapters[0].whole,
    )
    return result, losses


def _require_summable(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    """Refuse adapters that have no sum, and another number of weights."""
    for adapter in adapters:
        adapter.require_plain("combine")
        if adapter.whole and len(adapters) > 1:
            raise RecipeError(
                f"the adapter replaces {next(iter(adapter.whole))} as a whole (modules_to_save), which has no sum",
                file=adapter.path,
                fix="combine merged models, or adapters without modules_to_save",
            )
    if len(weights) != len(adapters):
        raise RecipeError(
            f"{len(weights)} weights for {len(adapters)} adapters", fix=f"--weights {','.join(['1'] * len(adapters))}"
        )
    if not all(map(math.isfinite, weights)):
        raise RecipeError(f"the weights {list(weights)} are not all finite", fix="--weights 0.7,0.3")


def _combined(
    module: str, parts: Sequence[tuple[float, LowRank]], method: Method, rank: int
) -> tuple[LowRank, Discarded]:
    """Return one matrix's combination, and what its rank discards."""
    if method.name == "concat":
        return weighted_sum(parts), Discarded(0.0, 0.0)
    if method.name == "svd":
        return truncated(weighted_sum(parts), rank=rank)
    if method.name == "linear":
        return _linear(module, parts), Discarded(0.0, 0.0)
    factors = torch.tensor([weight for weight, _ in parts], dtype=torch.float64)
    function: Any = getattr(merge_utils, method.name)
    matrix = function([dense(update) for _, update in parts], factors, method.density or _DENSITY)
    return approximated(matrix, rank=rank, transposed=parts[0][1].transposed)


def _linear(module: str, parts: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Return what PEFT's `linear` means: Σ √|wᵢsᵢ|·Aᵢ and Σ ±√|wᵢsᵢ|·Bᵢ, which has cross terms that the sum lacks."""
    ranks = {update.rank for _, update in parts}
    if len(ranks) > 1:
        raise RecipeError(
            f"--method linear adds the factors themselves, but the ranks of {module} are "
            f"{' and '.join(map(str, sorted(ranks)))}",
            fix="--method concat, which is exact, or svd",
        )
    factors = torch.tensor([math.sqrt(abs(weight * update.scale)) for weight, update in parts])
    signs = torch.tensor([math.copysign(1.0, weight) for weight, _ in parts])
    return LowRank(
        a=merge_utils.task_arithmetic([update.a for _, update in parts], factors),
        b=merge_utils.task_arithmetic([update.b for _, update in parts], signs * factors),
        scale=1.0,
        transposed=parts[0][1].transposed,
    )


def _sum_of_added(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Return Σ weight · what each adapter adds to a bias, by module."""
    total: dict[str, torch.Tensor] = {}
    for weight, adapter in zip(weights, adapters, strict=True):
        for module, tensor in adapter.added_biases.items():
            total[module] = weight * tensor + total.get(module, torch.zeros_like(tensor))
    return total


def _sum_of_biases(
    adapters: Sequence[Adapter], weights: Sequence[float], base: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Return base + Σ weight · (bias - base) for the biases that adapters replace."""
    names = sorted({name for adapter in adapters for name in adapter.biases})
    if names and list(weights) == [1.0] and len(adapters) == 1:
        return dict(adapters[0].biases)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        own = (base or {}).get(name)
        if own is None:
            raise RecipeError(
                f"an adapter replaces {name}, whose update is its difference from the base's", fix="--base FOLDER"
            )
        own = own.float()
        parts = [
            weight * (adapter.biases[name] - own)
            for weight, adapter in zip(weights, adapters, strict=True)
            if name in adapter.biases
        ]
        found[name] = own + torch.stack(parts).sum(0)
    return found
