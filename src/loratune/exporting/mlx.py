"""An adapter as mlx-lm loads it, and a reader that asks MLX itself.

    adapters.safetensors   model.layers.0.self_attn.q_proj.lora_a [d_in, r], .lora_b [r, d_out], float32
    adapter_config.json    rank, scale, and the names of the adapted matrices within a layer

mlx-lm supports one rank and one scale for all matrices, so lower ranks are padded with zeros and scales are part of B,
as `vllm.write_uniform` does it for the same reason. A merged model needs no file of its own: mlx-lm loads safetensors.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from loratune.data.prompts import render_prompts
from loratune.data.rows.conversation import Conversation
from loratune.data.rows.row import Origin
from loratune.exporting.adapter_matrices import LowRank, less_precise
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ADAPTER, CONFIG = "adapters.safetensors", "adapter_config.json"
_IN_LAYER = re.compile(r"^(.*\blayers\.)(\d+)\.(.+)$")


def has_mlx() -> bool:
    """Return whether mlx-lm is installed."""
    return find_spec("mlx_lm") is not None and find_spec("mlx") is not None


def check_mlx(updates: Mapping[str, LowRank]) -> None:
    """Refuse an adapter that mlx-lm cannot represent.

    Raises:
        RecipeError: It has DoRA's magnitudes, transposed matrices, or matrices outside of the layers.
    """
    for module, update in updates.items():
        if update.magnitude is not None or update.transposed or not _IN_LAYER.match(module):
            raise RecipeError(f"an adapter for mlx-lm cannot represent {module}", fix="--merged writes the full model")


def write_mlx_adapter(updates: Mapping[str, LowRank], num_layers: int, folder: Path) -> None:
    """Write an adapter for mlx-lm.

    Args:
        updates: The adapter's updates, accepted by `check_mlx`.
        num_layers: Layers of the model. mlx-lm adapts the same matrices of all of them; those without an update keep
            its own initial B, which is zero.
        folder: An existing folder to write into.
    """
    rank = max(update.rank for update in updates.values())
    tensors: dict[str, torch.Tensor] = {}
    keys = set()
    for module, update in updates.items():
        found = _IN_LAYER.match(module)
        assert found, "`check_mlx` refuses it"
        keys.add(found[3])
        padding = rank - update.rank
        tensors[f"{module}.lora_a"] = F.pad(update.a, (0, 0, 0, padding)).T.contiguous()
        tensors[f"{module}.lora_b"] = F.pad(update.scale * update.b, (0, padding)).T.contiguous()
    save_file(tensors, folder / ADAPTER, metadata={"format": "mlx"})
    settings = {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_mlx_adapter(folder: Path) -> dict[str, LowRank]:
    """Read the updates of an adapter for mlx-lm, by module name."""
    scale = float(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["lora_parameters"]["scale"])
    tensors = load_file(folder / ADAPTER)
    modules = sorted(name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a"))
    updates = {}
    for module in modules:
        a, b = (tensors[f"{module}.lora_{part}"] for part in "ab")
        updates[module] = LowRank(a=a.float().T, b=b.float().T, scale=scale, dtype=less_precise(a.dtype, b.dtype))
    return updates


class MlxReader:
    """A model loaded by mlx-lm, in float32 arithmetic.

    Args:
        folder: The model's folder.
        adapter: An adapter's folder; None for a merged model.
    """

    def __init__(self, folder: Path, *, adapter: Path | None = None) -> None:
        import mlx.core
        import mlx_lm

        self._mx: Any = mlx.core
        loaded: Any = mlx_lm.load(str(folder), adapter_path=None if adapter is None else str(adapter))
        self._model, self._tokenizer = loaded[:2]
        self._model.set_dtype(self._mx.float32)
        names = ("mlx", "mlx-lm")
        device = str(self._mx.default_device())
        self.checked_with = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) + f" on {device}"

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        conversation = Conversation(
            messages=(*messages, {"role": "assistant", "content": "-"}),  # whose text does not matter
            tools=tuple(tools) if tools else None,
            text=None,
            origin=Origin(file="held-out", line=1),
        )
        return render_prompts([conversation], self._tokenizer._tokenizer)[0].input_ids

    def logits(self, input_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        output = self._model(self._mx.array([list(input_ids)]))[0][self._mx.array(list(positions))]
        return torch.from_numpy(np.array(output.astype(self._mx.float32)))

    def ends_with(self, token_id: int) -> bool:
        return token_id in self._tokenizer.eos_token_ids
