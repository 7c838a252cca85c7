"""How llama.cpp lays out each architecture: names of tensors, order of rows, offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of llama.cpp.

    Attributes:
        arch: The architecture's key in the `gguf` package.
        interleaved: Whether llama.cpp rotates neighboring pairs of a head where transformers rotates its two halves,
            so that the rows of query and key are reordered.
        norm_offset: Whether the model's norms multiply by 1 + weight, as Gemma's do. llama.cpp multiplies by the
            weight, so the 1 is added in the file.
    """

    arch: MODEL_ARCH
    interleaved: bool = False
    norm_offset: bool = False

    @property
    def name(self) -> str:
        """The name in `general.architecture`."""
        return MODEL_ARCH_NAMES[self.arch]


FAMILIES: Mapping[str, Family] = {
    "llama": Family(arch=MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Family(arch=MODEL_ARCH.LLAMA, interleaved=True),
    "smollm3": Family(arch=MODEL_ARCH.SMOLLM3, interleaved=True),
    "qwen2": Family(arch=MODEL_ARCH.QWEN2),
    "qwen3": Family(arch=MODEL_ARCH.QWEN3),
    "gemma": Family(arch=MODEL_ARCH.GEMMA, norm_offset=True),
    "gemma2": Family(arch=MODEL_ARCH.GEMMA2, norm_offset=True),
    "gemma3_text": Family(arch=MODEL_ARCH.GEMMA3, norm_offset=True),
}
"""transformers' `model_type` → family."""


def family_of(config: Any) -> Family:
    """Return the family of a model.

    Args:
        config: transformers' configuration of the model.

    Raises:
        RecipeError: loratune does not write GGUF files of this architecture.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise RecipeError(
            f"loratune does not write GGUF files of architecture {config.model_type}",
            fix=f"supported: {', '.join(FAMILIES)}; for others --llama-cpp DIR, a checkout of llama.cpp",
        )
    return family


def layout_of(config: Any) -> GgufLayout | None:
    """Return how a model's tensors are laid out in a GGUF file; None where only llama.cpp's own converter knows."""
    return GgufLayout(config) if config.model_type in FAMILIES else None


class GgufLayout:
    """Names and row orders of a model's tensors in a GGUF file.

    Args:
        config: transformers' configuration of the model.

    Raises:
        RecipeError: loratune does not write GGUF files of this architecture.
    """

    def __init__(self, config: Any) -> None:
        self.family = family_of(config)
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(getattr(config, "num_key_value_heads", None) or self._heads)
        self._names: TensorNameMap = get_tensor_name_map(self.family.arch, int(config.num_hidden_layers))

    def name(self, tensor: str) -> str | None:
        """Translate a tensor's name: `model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`.

        Returns:
            The GGUF name; None for a tensor that llama.cpp does not have.
        """
        name: str | None = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        return name

    def rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Reorder the rows of a matrix, a bias or an adapter's B for llama.cpp. `name` is the GGUF name."""
        heads = self._heads_in(name)
        return tensor if heads is None else _swapped(tensor, heads, 2)

    def rows_back(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Undo `rows`."""
        heads = self._heads_in(name)
        return tensor if heads is None else _swapped(tensor, heads, tensor.shape[0] // heads // 2)

    def values(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Convert a tensor of the model to llama.cpp's layout."""
        if self.family.norm_offset and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        return self.rows(name, tensor)

    def _heads_in(self, name: str) -> int | None:
        if not self.family.interleaved:
            return None
        return self._heads if ".attn_q." in name else self._kv_heads if ".attn_k." in name else None


def _swapped(tensor: torch.Tensor, heads: int, outer: int) -> torch.Tensor:
    """Transpose each head's rows, read as a table of `outer` lines."""
    return tensor.reshape(heads, outer, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
