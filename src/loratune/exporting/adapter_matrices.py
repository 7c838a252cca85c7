"""A saved adapter as matrices: what it adds to which weight, in float32."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from loratune.model.adapter.attach import adapter_file
from loratune.model.adapter.new_tokens import trained_numbers
from loratune.run.errors import RunError

PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The update of one matrix W of d_out × d_in: W + scale · B · A, and with DoRA its rows scaled to `magnitude`.

    Attributes:
        a: float32 [r, d_in].
        b: float32 [d_out, r].
        scale: alpha/r, or alpha/√r with rank-stabilised LoRA.
        magnitude: float32 [d_out] with DoRA, else None.
        transposed: Whether the model keeps W as d_in × d_out, as GPT-2 does.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged matrix in float32, in the layout of `weight`."""
        whole = weight.float().T if self.transposed else weight.float()
        merged = whole + self.scale * (self.b @ self.a)
        if self.magnitude is not None:  # Liu et al. 2024, equation 5
            merged = merged * (self.magnitude / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged.T if self.transposed else merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """What stands in the place of a tensor of the base, or of some of its rows.

    Attributes:
        values: float32; the whole tensor, or [rows, H].
        rows: Their numbers; None where it is all of them.
        num_rows: Of the tensor, where it grows; else 0.
    """

    values: torch.Tensor
    rows: tuple[int, ...] | None = None
    num_rows: int = 0

    def shape(self, own: list[int]) -> list[int]:
        """Of the tensor that `applied_to` makes of one of this shape."""
        return [max(own[0], self.num_rows), *own[1:]] if self.num_rows else own

    def applied_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The tensor with the new values, in float32."""
        if self.rows is None:
            return self.values
        whole = self.values.new_zeros(self.shape(list(weight.shape)))
        whole[: weight.shape[0]] = weight
        whole[list(self.rows)] = self.values
        return whole


def read_replaced(folder: Path) -> dict[str, Replaced]:
    """Tensor of the base → what the adapter has in its place: modules that were trained whole, rows of new tokens."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    replaced = {}
    for saved, tensor in load_file(adapter_file(folder)).items():
        name = saved.removeprefix(PREFIX)
        if name.endswith(_ROWS):
            numbers = sorted(trained_numbers(config))
            values = Replaced(values=tensor.float(), rows=tuple(numbers), num_rows=numbers[-1] + 1)
            replaced[f"{name.removesuffix(_ROWS)}.weight"] = values
        elif _is_whole(name, config):
            replaced[name] = Replaced(values=tensor.float())
    return replaced


def _is_whole(name: str, config: dict[str, Any]) -> bool:
    """Whether a saved tensor belongs to `modules_to_save`, which of a tied pair names the embedding alone, or to new tokens."""
    return name.endswith(_ROWS) or (bool(config.get("modules_to_save")) and ".lora_" not in name)


def adapts_stacks(folder: Path) -> bool:
    """Whether an adapter changes parameters that no linear module has: `lora.target_parameters`."""
    return bool(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("target_parameters"))


def _is_stack(name: str, config: dict[str, Any]) -> bool:
    """Whether a saved tensor belongs to `target_parameters`; PEFT nests a module's second one into `base_layer`."""
    module = name.partition(".lora_")[0].replace(".base_layer", "")
    owners = {target.rpartition(".")[0] for target in config.get("target_parameters") or ()}
    return any(module == owner or module.endswith(f".{owner}") for owner in owners)


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """Module name → its update, from a folder in PEFT's format; stacks of matrices are left out (`adapts_stacks`).

    Raises:
        RunError: The adapter holds something else than low-rank updates of matrices.
    """
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {name.removeprefix(PREFIX): t.float() for name, t in load_file(adapter_file(folder)).items()}
    tensors = {
        name: tensor for name, tensor in tensors.items() if not _is_whole(name, config) and not _is_stack(name, config)
    }
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    updates: dict[str, LowRank] = {}
    for module in sorted(modules):
        a = tensors.pop(f"{module}.lora_A.weight")
        updates[module] = LowRank(
            a=a,
            b=tensors.pop(f"{module}.lora_B.weight"),
            scale=_scale(config, module, a.shape[0]),
            magnitude=tensors.pop(f"{module}.lora_magnitude_vector", None),
            transposed=bool(config.get("fan_in_fan_out")),
        )
    if tensors or not updates:
        odd = next(iter(tensors), "nothing")
        raise RunError(
            f"the adapter holds {odd}, which is no low-rank update of a matrix", file=folder, fix="load it with PEFT"
        )
    return updates


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
