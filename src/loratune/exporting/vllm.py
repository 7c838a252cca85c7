"""Check and write an adapter for vLLM, and build the command that serves it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from safetensors.torch import save_file

from loratune.exporting.adapter_matrices import PREFIX, LowRank
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` accepts (vLLM 0.11, `LoRAConfig`)."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
MODULES: Mapping[str, Collection[str]] = {
    "llama": (*_ATTENTION, *_GATED),
    "mistral": (*_ATTENTION, *_GATED),
    "smollm3": (*_ATTENTION, *_GATED),
    "qwen2": (*_ATTENTION, *_GATED),
    "qwen3": (*_ATTENTION, *_GATED),
    "gemma": (*_ATTENTION, *_GATED),
    "gemma2": (*_ATTENTION, *_GATED),
    "gemma3_text": (*_ATTENTION, *_GATED),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "granite": (*_ATTENTION, *_GATED),
}
"""transformers' `model_type` → the matrices that vLLM adapts."""

_MERGE = "--merged serves the full model"


def check_vllm(updates: Mapping[str, LowRank], config: Any) -> int:
    """Return the smallest `--max-lora-rank` that loads this adapter.

    Raises:
        RecipeError: vLLM does not load this adapter.
    """
    known = MODULES.get(config.model_type)
    if known is None:
        raise RecipeError(
            f"vLLM is not known to adapt {config.model_type}", fix=f"supported: {', '.join(MODULES)}; {_MERGE}"
        )
    unknown = sorted({module.rpartition(".")[2] for module in updates} - set(known))
    if unknown:
        raise RecipeError(f"vLLM does not adapt {', '.join(unknown)} of {config.model_type}", fix=_MERGE)
    if any(update.magnitude is not None for update in updates.values()):
        raise RecipeError("vLLM does not load DoRA", fix=_MERGE)
    rank = max(update.rank for update in updates.values())
    fitting = next((allowed for allowed in RANKS if allowed >= rank), None)
    if fitting is None:
        raise RecipeError(f"the rank is {rank}, and vLLM loads at most {RANKS[-1]}", fix=_MERGE)
    return fitting


def write_uniform(updates: Mapping[str, LowRank], config: Mapping[str, Any], folder: Path) -> None:
    """Write the same adapter with one rank and one scale, since vLLM ignores `rank_pattern` and `alpha_pattern`.

    Lower ranks are padded with zeros, and each matrix's scale is multiplied into its B.

    Args:
        updates: The adapter's updates, without DoRA magnitudes.
        config: `adapter_config.json` of the run.
        folder: An existing folder to write into.
    """
    rank = max(update.rank for update in updates.values())
    tensors = {}
    for module, update in updates.items():
        padding = rank - update.rank
        tensors[f"{PREFIX}{module}.lora_A.weight"] = F.pad(update.a, (0, 0, 0, padding)).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = F.pad(update.scale * update.b, (0, padding)).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **plain}, indent=2) + "\n", encoding="utf-8")


def serve_adapter(
    *, base: str, revision: str | None, adapter: Path, name: str, rank: int, dtype: str, has_template: bool = True
) -> str:
    """Return the shell command that serves base and adapter.

    Args:
        base: The base's Hub id or folder.
        revision: The base's revision on the Hub; None for a folder.
        adapter: The folder with the adapter, its template, and a generation config with the stop tokens.
        name: The fine-tuned model's name in requests.
        rank: The maximum rank, from `check_vllm`.
        dtype: The type of the weights in training.
        has_template: Whether the tokenizer has a chat template.
    """
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else []), "--dtype", dtype]
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={adapter}"]
    words += ["--generation-config", str(adapter)]
    words += ["--chat-template", str(adapter / "chat_template.jinja")] if has_template else []
    return shlex.join(words)


def serve_merged(folder: Path, *, name: str) -> str:
    """Return the shell command that serves a merged folder."""
    return shlex.join(["vllm", "serve", str(folder), "--served-model-name", name])


def serve_words(command: str, *, base_name: str, host: str, port: int) -> tuple[str, ...]:
    """Return the words of a `serve_adapter` command, with an address and a name for the base added."""
    return (*shlex.split(command), "--served-model-name", base_name, "--host", host, "--port", str(port))
