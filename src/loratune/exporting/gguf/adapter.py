"""Write an adapter as a GGUF LoRA file, for `llama-cli --lora`, and read it back.

llama.cpp computes W·x + (adapter.lora.alpha / r) · B·(A·x), with r read from B. The file's tensors are named after the
weights of the base; their architecture must be that of the base's file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, dequantize

from loratune.exporting.adapter_matrices import LowRank, less_precise
from loratune.exporting.gguf.architectures import GgufLayout
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def write_gguf_adapter(updates: Mapping[str, LowRank], config: Any, file: Path, *, name: str) -> None:
    """Write the adapter in float32.

    Args:
        updates: Module name → low-rank update.
        config: transformers' configuration of the base.
        file: The file to write.
        name: The value of `general.name` in the file.

    Raises:
        RecipeError: The architecture is unknown, or the adapter is more than matrices A and B.
    """
    layout = GgufLayout(config)
    names = {module: _weight_name(layout, module) for module in updates}
    check_plain(updates)
    alpha = next(update.scale * update.rank for update in updates.values())
    writer = GGUFWriter(str(file), layout.family.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_name(name)
    writer.add_float32("adapter.lora.alpha", alpha)
    for module, update in updates.items():
        factor = update.scale * update.rank / alpha  # 1 unless ranks or scales differ between modules
        b = layout.rows(names[module], update.b * factor)
        writer.add_tensor(f"{names[module]}.lora_a", update.a.contiguous().numpy())
        writer.add_tensor(f"{names[module]}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_adapter(file: Path, config: Any, modules: Iterable[str]) -> dict[str, LowRank]:
    """Read the updates from a GGUF LoRA file, as llama.cpp applies them.

    Args:
        file: The GGUF file.
        config: transformers' configuration of the base.
        modules: The modules whose names in the file are known; what else it adapts keeps the file's name.

    Raises:
        RunError: Its matrices are quantized.
    """
    layout = GgufLayout(config)
    reader = GGUFReader(file)
    field = reader.get_field("adapter.lora.alpha")
    assert field is not None
    alpha = float(field.contents())
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    if quantized := [f"{name} is {kind.name}" for name, kind in kinds.items() if kind not in _TYPES]:
        raise RunError(
            f"{quantized[0]}, of which no rounding is known", file=file, fix="convert the adapter with --outtype f16"
        )
    tensors = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in reader.tensors
    }
    module_of = {_weight_name(layout, module): module for module in modules}
    updates = {}
    for name in sorted(tensor.removesuffix(".lora_a") for tensor in tensors if tensor.endswith(".lora_a")):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        updates[module_of.get(name, name)] = LowRank(
            a=a.float(),
            b=layout.rows_back(name, b.float()),
            scale=alpha / b.shape[1],
            dtype=less_precise(*(_TYPES[kinds[f"{name}.lora_{part}"]] for part in "ab")),
        )
    return updates


def check_plain(updates: Mapping[str, LowRank]) -> None:
    """Refuse an adapter that is more than matrices A and B."""
    if any(update.magnitude is not None for update in updates.values()):
        raise RecipeError("a GGUF adapter cannot represent DoRA's magnitudes", fix="--merged writes the full model")


def _weight_name(layout: GgufLayout, module: str) -> str:
    name = layout.name(f"{module}.weight")
    if name is None:
        raise RecipeError(
            f"llama.cpp's {layout.family.name} has no weight for the adapted module {module}", fix="try --merged"
        )
    return name
