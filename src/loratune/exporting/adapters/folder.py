"""Adapters of any origin in PEFT's format: read with everything in them, and written as plain LoRA of scale 1."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from loratune.exporting.adapter_matrices import PREFIX, LowRank, Replaced, read_adapter, read_replaced
from loratune.model.adapter.attach import adapter_file
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_PLAIN = {
    "use_dora": "is DoRA, whose magnitudes scale base and update together, so that it is no low-rank update",
    "target_parameters": "adapts stacked parameters (target_parameters)",
    "trainable_token_indices": "trains rows of the embedding (trainable_token_indices)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "use_qalora": "pools its inputs (use_qalora)",
    "alora_invocation_tokens": "is active from certain tokens on only (alora_invocation_tokens)",
    "arrow_config": "routes between adapters (arrow_config)",
}
"""Setting of PEFT's `LoraConfig` → what an adapter that uses it is, beyond updates of matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's folder.

    Attributes:
        path: The folder.
        config: Its `adapter_config.json`.
        updates: Module → the update of its weight.
        added_biases: Module → what is added to its bias, float32 (PEFT's `lora_bias`).
        biases: Tensor name → the bias that replaces the base's, float32 (PEFT's `bias: all` or `lora_only`).
        whole: Tensor name → what replaces a tensor of the base (`modules_to_save`, new tokens).
    """

    path: Path
    config: dict[str, Any]
    updates: Mapping[str, LowRank]
    added_biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    whole: Mapping[str, Replaced] = field(default_factory=dict)

    @property
    def base_name(self) -> str:
        """The base model that the adapter names; empty if it names none."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def kind(self) -> str:
        """The method in words, such as `LoRA` or `rank-stabilized LoRA`."""
        if self.config.get("use_dora"):
            return "DoRA"
        return "rank-stabilized LoRA" if self.config.get("use_rslora") else "LoRA"

    def require_plain(self, verb: str) -> None:
        """Refuse what is more than updates of matrices, biases and whole tensors.

        Raises:
            RecipeError: It is.
        """
        for name, what in _NOT_PLAIN.items():
            if self.config.get(name):
                raise RecipeError(
                    f"the adapter {what}: {verb} does not take it",
                    file=self.path / CONFIG,
                    fix="`loratune adapter merge ADAPTER OUT`, which writes base and adapter as one model"
                    if name == "use_dora"
                    else "load it with PEFT",
                )


def read_folder(path: Path) -> Adapter:
    """Read an adapter with everything in it.

    Raises:
        RecipeError: It is no LoRA adapter in safetensors.
        RunError: It holds something that is not a low-rank update, a bias or a whole tensor.
    """
    file = path / CONFIG
    if not file.is_file():
        raise RecipeError("no adapter_config.json in it", file=path, fix="give an adapter's folder in PEFT's format")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise RecipeError(f"not JSON: {error}", file=file, fix="restore it, or save the adapter again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise RecipeError(f"the adapter is {kind}, not LoRA", file=file, fix="peft.convert_to_lora makes a LoRA of it")
    tensors = load_file(adapter_file(path))
    biases = {  # PEFT names an adapted module's own bias as it has it in memory
        name.removeprefix(PREFIX).replace(".base_layer.bias", ".bias"): tensor.float()
        for name, tensor in tensors.items()
        if name.endswith(".bias")
    }
    added = {
        name.removesuffix(".lora_B.bias"): tensor for name, tensor in biases.items() if name.endswith(".lora_B.bias")
    }
    updates = read_adapter(path, without_biases=True)
    whole = {name: values for name, values in read_replaced(path).items() if not name.endswith(".lora_B.bias")}
    trained = config.get("bias", "none") != "none"
    return Adapter(
        path=path,
        config=config,
        updates=updates,
        added_biases={module: updates[module].scale * tensor for module, tensor in added.items()},
        biases={name: t for name, t in biases.items() if trained and not name.endswith(".lora_B.bias")},
        whole=whole,
    )


def num_parameters(adapter: Adapter) -> int:
    """Return how many numbers an adapter holds."""
    matrices = sum(update.a.numel() + update.b.numel() for update in adapter.updates.values())
    magnitudes = sum(update.magnitude.numel() for update in adapter.updates.values() if update.magnitude is not None)
    others = sum(tensor.numel() for tensor in (*adapter.biases.values(), *adapter.added_biases.values()))
    return matrices + magnitudes + others + sum(item.values.numel() for item in adapter.whole.values())


def write_folder(folder: Path, adapter: Adapter) -> None:
    """Write updates, biases and whole tensors as a plain LoRA adapter whose scales are 1, in float32.

    Args:
        folder: An existing folder.
        adapter: Its `config` gives base, task and targets; ranks, scales and variant are those of its updates.
    """
    old, updates = adapter.config, adapter.updates
    ranks = {module: update.rank for module, update in updates.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=old["target_modules"],
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=bool(old.get("fan_in_fan_out")),
        bias=old.get("bias", "none") if adapter.biases else "none",
        lora_bias=bool(adapter.added_biases),
        modules_to_save=old.get("modules_to_save"),
        task_type=old.get("task_type"),
        base_model_name_or_path=old.get("base_model_name_or_path"),
        revision=old.get("revision"),
        inference_mode=True,
    )
    tensors: dict[str, torch.Tensor] = {}
    for module, update in updates.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = update.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = update.b
        if adapter.added_biases:  # PEFT wants all of them or none
            zero = torch.zeros(update.b.shape[0])
            tensors[f"{PREFIX}{module}.lora_B.bias"] = adapter.added_biases.get(module, zero)
    for name, tensor in adapter.biases.items():
        module = name.removesuffix(".bias")
        tensors[f"{PREFIX}{module}.base_layer.bias" if module in updates else PREFIX + name] = tensor
    tensors |= {PREFIX + name: item.values for name, item in adapter.whole.items()}
    save_file(
        {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))


def targets_of(adapters: list[Adapter], updates: Mapping[str, LowRank]) -> list[str]:
    """Return `target_modules` for updates that several adapters had: theirs if all are the same, else full names."""
    first = adapters[0].config.get("target_modules")
    only = ("layers_to_transform", "exclude_modules")
    chosen = any(adapter.config.get(name) is not None for adapter in adapters for name in only)
    modules = [set(adapter.updates) for adapter in adapters]
    if isinstance(first, list) and not chosen and all(found == modules[0] for found in modules):
        return sorted(first)
    return sorted(updates)
