"""Adapters in PEFT's format, whoever made them: read with everything in them, and written as plain LoRA of scale 1."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from loratune.exporting.adapter_matrices import (
    PREFIX,
    LowRank,
    Replaced,
    read_adapter,
    read_replaced,
    stacked_modules,
)
from loratune.model.adapter.attach import adapter_file
from loratune.model.adapter.variants import initialization_that_changes_base
from loratune.model.safetensors_headers import read_header
from loratune.model.weight_facts import first_not_finite
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SAVED_EARLIER = "give an earlier checkpoint of it"
_VARIANTS = {
    item.name: f"computes with a variant of PEFT's ({item.name})"
    for item in fields(LoraConfig)
    if item.metadata.get("is_lora_variant") and item.name != "kasa_config"  # which changes the base besides
}
_NOT_PLAIN = {
    **_VARIANTS,
    "use_dora": "is DoRA, whose magnitudes scale base and update together, so it is not a low-rank update",
    "target_parameters": "adapts stacked parameters (target_parameters)",
    "trainable_token_indices": "trains rows of the embedding (trainable_token_indices)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "use_qalora": "pools its inputs (use_qalora)",
    "alora_invocation_tokens": "is active from certain tokens on only (alora_invocation_tokens)",
    "arrow_config": "routes between adapters (arrow_config)",
}
"""Setting of PEFT's `LoraConfig` → what an adapter that uses it is, beyond updates of matrices."""

MERGEABLE = frozenset({"use_dora", "trainable_token_indices"})
"""Those of these settings whose adapters are one model with their base, and no sum of updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's folder.

    Attributes:
        path: The folder.
        config: Its `adapter_config.json`.
        updates: Module → the update of its weight.
        added_biases: Module → what is added to its bias, float32 (PEFT's `lora_bias`).
        biases: Tensor name → the bias that replaces the base's, in the type of its file (PEFT's `bias: all` or
            `lora_only`).
        whole: Tensor name → what replaces a tensor of the base (`modules_to_save`, rows of tokens).
        stacks: Modules whose stacked parameters it adapts (`target_parameters`), which are not read.
    """

    path: Path
    config: dict[str, Any]
    updates: Mapping[str, LowRank]
    added_biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    whole: Mapping[str, Replaced] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()

    @property
    def base_name(self) -> str:
        """The base model that the adapter names; empty if it names none."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def kind(self) -> str:
        """The method in words, such as `rank-stabilized LoRA`, with what it is beyond updates of matrices."""
        kind = "rank-stabilized LoRA" if self.config.get("use_rslora") else "LoRA"
        kind = "DoRA" if self.config.get("use_dora") else kind
        more = [name for name in _NOT_PLAIN if self.config.get(name) and name != "use_dora"]
        kind += f" with {', '.join(more)}" if more else ""
        changed = initialization_that_changes_base(self.config)
        return kind if changed is None else f"{kind} for the residual of its base ({changed})"

    def require_plain(self, verb: str, *, allowed: frozenset[str] = frozenset()) -> None:
        """Refuse an adapter with more than updates of matrices, biases and full tensors of the unchanged base.

        Args:
            verb: What does not take it.
            allowed: Settings of PEFT's `LoraConfig` that it takes nevertheless.

        Raises:
            RecipeError: It is.
        """
        for name, what in _NOT_PLAIN.items():
            if name in allowed or not self.config.get(name):
                continue
            raise RecipeError(
                f"the adapter {what}: {verb} does not take it",
                file=self.path / CONFIG,
                fix="`loratune adapter merge ADAPTER OUT`, which writes base and adapter as one model"
                if name in MERGEABLE
                else "load it with PEFT, whose merge_and_unload writes one model where the method has one",
            )
        changed = initialization_that_changes_base(self.config)
        if changed is not None:
            raise RecipeError(
                f"the adapter's initialization ({changed}) changed its base's weights, and {verb} reads those before "
                "the change",
                file=self.path / CONFIG,
                fix="load it with PEFT on the quantized base that it was trained on"
                if changed == "loftq"
                else "save it for the untouched base where it was trained: PEFT's save_pretrained(OUT, "
                "path_initial_model_for_weight_conversion=INITIAL); the adapter of a run of loratune is one already",
            )


def read_folder(path: Path) -> Adapter:
    """Read an adapter with everything in it.

    Raises:
        RecipeError: It is not a LoRA adapter in safetensors.
        RunError: It contains something that is not a low-rank update, a bias or a full tensor, or values that are not
            finite.
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
    weights = adapter_file(path)
    if (name := first_not_finite(weights)) is not None:
        raise RunError(f"{name.removeprefix(PREFIX)} is NaN or infinite", file=weights, fix=_SAVED_EARLIER)
    tensors = load_file(weights)
    biases = {  # PEFT names an adapted module's own bias as it has it in memory
        name.removeprefix(PREFIX).replace(".base_layer.bias", ".bias"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".bias")
    }
    added = {
        name.removesuffix(".lora_B.bias"): tensor for name, tensor in biases.items() if name.endswith(".lora_B.bias")
    }
    updates = read_adapter(path, without_biases=True)
    for module, update in updates.items():
        if update.a.dim() != 2 or update.b.dim() != 2:
            raise RunError(f"the update of {module} is not a matrix", file=weights, fix="load it with PEFT")
    whole = {name: values for name, values in read_replaced(path).items() if not name.endswith(".lora_B.bias")}
    trained = config.get("bias", "none") != "none"
    return Adapter(
        path=path,
        config=config,
        updates=updates,
        added_biases={module: updates[module].scale * tensor.float() for module, tensor in added.items()},
        biases={name: t for name, t in biases.items() if trained and not name.endswith(".lora_B.bias")},
        whole=whole,
        stacks=stacked_modules(tensors, config),
    )


def num_parameters(folder: Path) -> int:
    """Return how many numbers an adapter's folder contains."""
    return sum(math.prod(shape) for shape in read_header(adapter_file(folder)).values())


def write_folder(folder: Path, adapter: Adapter) -> None:
    """Write updates, biases and full tensors as a plain LoRA adapter whose scales are 1, in float32.

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
        ensure_weight_tying=bool(old.get("ensure_weight_tying")),
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
