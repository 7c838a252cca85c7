"""A saved adapter as float32 matrices, by the weight that each of them updates."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from loratune.model.adapter.attach import adapter_file
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The update of one d_out × d_in matrix: W + scale · B · A. With DoRA, its rows are then scaled to `magnitude`.

    Attributes:
        a: float32 [r, d_in].
        b: float32 [d_out, r].
        scale: alpha/r, or alpha/√r with rank-stabilised LoRA.
        magnitude: float32 [d_out] with DoRA, else None.
        transposed: Whether the model stores W as d_in × d_out, as GPT-2 does.
        dtype: The type of A and B in their file: the less precise one, if they have two.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    transposed: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged matrix in float32, in the layout of `weight`."""
        base = weight.float().T if self.transposed else weight.float()
        merged = base + self.scale * (self.b @ self.a)
        if self.magnitude is not None:  # Liu et al. 2024, equation 5
            merged = merged * (self.magnitude / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged.T if self.transposed else merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """New values for a tensor of the base, or for some of its rows.

    Attributes:
        values: The full tensor, or [rows, H], in the type of its file.
        rows: The indices of the rows; None for the full tensor.
        num_rows: The tensor's number of rows where it grows; 0 where it does not.
        added: Whether `values` are the base's with something added, so that a merge may round twice.
    """

    values: torch.Tensor
    rows: tuple[int, ...] | None = None
    num_rows: int = 0
    added: bool = False

    def shape(self, own: list[int]) -> list[int]:
        """Return the shape of `applied_to` for a tensor of shape `own`."""
        return [max(own[0], self.num_rows), *own[1:]] if self.num_rows else own

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the tensor with the new values, in float32."""
        if self.rows is None:
            return self.values.float()
        tensor = torch.zeros(self.shape(list(weight.shape)))
        tensor[: weight.shape[0]] = weight
        tensor[list(self.rows)] = self.values.float()
        return tensor


def read_replaced(folder: Path) -> dict[str, Replaced]:
    """Read the tensors that an adapter replaces: modules trained in full, and the rows of new tokens."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    replaced = {}
    for saved, tensor in load_file(adapter_file(folder)).items():
        name = saved.removeprefix(PREFIX)
        if name.endswith(_ROWS):
            module = name.removesuffix(_ROWS)
            numbers = _rows_of(module, config)
            values = Replaced(values=tensor, rows=tuple(numbers), num_rows=max(numbers) + 1)
            replaced[f"{module}.weight"] = values
        elif _is_replaced(name, config):
            replaced[name] = Replaced(values=tensor)
    return replaced


def _rows_of(module: str, config: dict[str, Any]) -> list[int]:
    """Return the numbers of a module's trained rows, in the order of the saved values."""
    numbers: Any = config["trainable_token_indices"]
    if not isinstance(numbers, dict):
        return list(numbers)
    return list(next(rows for name, rows in numbers.items() if f".{module}".endswith(f".{name}")))


def _is_replaced(name: str, config: dict[str, Any]) -> bool:
    """Return whether a saved tensor belongs to `modules_to_save` or to new tokens."""
    # By what it is not: of a tied embedding and head, `modules_to_save` names the embedding alone.
    return name.endswith(_ROWS) or (bool(config.get("modules_to_save")) and ".lora_" not in name)


def stacked_modules(names: Iterable[str], config: dict[str, Any]) -> tuple[str, ...]:
    """Return the modules whose stacked parameters an adapter adapts, which `read_adapter` leaves out.

    Args:
        names: The names of its tensors.
        config: Its `adapter_config.json`.
    """
    stacked = (name.removeprefix(PREFIX) for name in names if _is_stack(name.removeprefix(PREFIX), config))
    return tuple(sorted({name.partition(".lora_")[0].replace(".base_layer", "") for name in stacked}))


def _is_stack(name: str, config: dict[str, Any]) -> bool:
    """Return whether a saved tensor belongs to `target_parameters`."""
    # PEFT nests a module's second parameter into `base_layer`.
    module = name.partition(".lora_")[0].replace(".base_layer", "")
    owners = {target.rpartition(".")[0] for target in config.get("target_parameters") or ()}
    return any(module == owner or module.endswith(f".{owner}") for owner in owners)


def read_adapter(folder: Path, *, without_biases: bool = False) -> dict[str, LowRank]:
    """Read the low-rank updates from a folder in PEFT's format, by module name.

    Updates of stacked matrices (`lora.target_parameters`) are left out; biases, which no recipe trains, if asked for.

    Raises:
        RunError: The adapter contains anything but low-rank updates of matrices.
    """
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(adapter_file(folder)).items()}
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not _is_replaced(name, config) and not _is_stack(name, config)
        if not (without_biases and name.endswith(".bias"))
    }
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    updates: dict[str, LowRank] = {}
    for module in sorted(modules):
        a, b = (tensors.pop(f"{module}.lora_{part}.weight") for part in "AB")
        magnitude = tensors.pop(f"{module}.lora_magnitude_vector", None)
        updates[module] = LowRank(
            a=a.float(),
            b=b.float(),
            scale=_scale(config, module, a.shape[0]),
            magnitude=None if magnitude is None else magnitude.float(),
            transposed=bool(config.get("fan_in_fan_out")),
            dtype=less_precise(a.dtype, b.dtype),
        )
    if tensors or not updates:
        unknown = next(iter(tensors), "nothing")
        raise RunError(
            f"the adapter holds {unknown}, which is not a low-rank update of a matrix",
            file=folder,
            fix="load it with PEFT",
        )
    return updates


def less_precise(*dtypes: torch.dtype) -> torch.dtype:
    """Return the type that rounds most."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
