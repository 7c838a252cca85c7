"""What a GGUF file says about the model in it, as transformers' configuration.

transformers' own reader leaves out settings that change what is computed (5.23: the stretched positions of Llama 3, the
size of a Qwen3 head, Llama's biases, Gemma's attention scale and caps), and computes with its defaults instead. They
are read here, with the values that llama.cpp computes with when a file lacks them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from loratune.run.progress import Progress

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of a GGUF file by which the rotary frequencies are divided, one value for each pair of a head."""

_KNOWN = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
"""Architectures whose settings are all read here."""

_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""The layers by which llama.cpp recognizes the 27B models, whose attention scale has another rule."""

_READ = {
    *("context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}
"""Settings, without the architecture's name, that transformers' reader or this module reads."""

_ROPE_KINDS = {"none": "default", "linear": "linear", "yarn": "yarn"}


@dataclass(frozen=True, slots=True)
class _Header:
    """The settings of a file without the architecture's name, the names of its tensors, its factors of positions."""

    file: Path
    architecture: str
    settings: Mapping[str, Any]
    tensors: frozenset[str]
    factors: np.ndarray[Any, Any] | None

    def refuse(self, what: str) -> RunError:
        return RunError(
            f"{what}: transformers would compute another model",
            file=self.file,
            fix="use the model's safetensors folder instead",
        )


def gguf_config(file: Path, progress: Progress | None = None) -> Any:
    """Return transformers' configuration of the model in a GGUF file.

    Args:
        file: The GGUF file.
        progress: Is told of settings that nobody reads; None: nobody is.

    Raises:
        RunError: The file has a setting that changes what is computed and that transformers cannot compute.
        ValueError: transformers does not know the architecture.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    header = _read(file)
    if header.architecture in _KNOWN:
        _complete(config, header)
        unread = sorted(set(header.settings) - _READ)
    else:
        _refuse_positions(config, header)
        unread = sorted(name for name in header.settings if name.startswith("rope.scaling"))
        if progress is not None:
            progress.warn(
                f"{file.name}: how transformers reads the architecture {header.architecture} was not compared with "
                "llama.cpp; the model's safetensors folder is the safer base"
            )
    if unread and progress is not None:
        values = ", ".join(f"{name}={header.settings[name]}" for name in unread)
        progress.warn(f"{file.name}: settings that are not read: {values}")
    return config


def gemma_attention_scalar(architecture: str, layers: int, hidden: int, heads: int, head_dim: int) -> float:
    """Return whose root llama.cpp divides Gemma's attention scores by; no GGUF file says it.

    Args:
        architecture: `gemma2` or `gemma3`.
        layers: The number of layers.
        hidden: The size of the hidden states.
        heads: The number of attention heads.
        head_dim: The size of a head.
    """
    return hidden / heads if layers == _LARGEST_GEMMA[architecture] else head_dim


def _read(file: Path) -> _Header:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    values = {entry.name: entry for entry in reader.fields.values()}
    architecture = str(values["general.architecture"].contents())
    prefix = f"{architecture}."
    factors = next((tensor for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    return _Header(
        file=file,
        architecture=architecture,
        settings={name.removeprefix(prefix): values[name].contents() for name in values if name.startswith(prefix)},
        tensors=frozenset(tensor.name for tensor in reader.tensors),
        factors=None if factors is None else np.array(factors.data, np.float64),
    )


def _complete(config: Any, header: _Header) -> None:
    settings, tensors = header.settings, header.tensors
    if settings.get("expert_count"):
        raise header.refuse(f"{header.architecture} with {settings['expert_count']} experts is not read")
    head_dim = settings.get("attention.key_length") or config.hidden_size // config.num_attention_heads
    if settings.get("attention.value_length", head_dim) != head_dim:
        raise header.refuse(
            f"keys of {head_dim} values and values of {settings['attention.value_length']} are not read"
        )
    if settings.get("rope.dimension_count", head_dim) != head_dim:
        raise header.refuse(f"positions for {settings['rope.dimension_count']} of a head's {head_dim} are not read")
    config.head_dim = int(head_dim)
    if header.architecture in ("llama", "qwen3"):
        config.attention_bias = "blk.0.attn_q.bias" in tensors
    if header.architecture == "llama":
        config.mlp_bias = "blk.0.ffn_up.bias" in tensors
        if getattr(config, "sliding_window", None) is not None:  # Mistral's; no GGUF file of this architecture says one
            config.sliding_window = None
    if header.architecture.startswith("gemma"):
        _complete_gemma(config, header)
    rope = _positions(config, header)
    if header.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": float(settings.get("rope.freq_base_swa", 10_000.0))}
        config.rope_parameters = {"full_attention": rope, "sliding_attention": local}
    else:
        config.rope_parameters = rope


def _complete_gemma(config: Any, header: _Header) -> None:
    scalar = gemma_attention_scalar(
        header.architecture,
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
    )
    config.query_pre_attn_scalar = int(scalar) if scalar == int(scalar) else scalar
    # What llama.cpp computes with when a file of Gemma 2 does not say it.
    otherwise = (50.0, 30.0) if header.architecture == "gemma2" else (None, None)
    config.attn_logit_softcapping = header.settings.get("attn_logit_softcapping", otherwise[0])
    config.final_logit_softcapping = header.settings.get("final_logit_softcapping", otherwise[1])


def _positions(config: Any, header: _Header) -> dict[str, Any]:
    """Return transformers' parameters of a file's rotary positions."""
    settings = header.settings
    theta = float(settings.get("rope.freq_base", 10_000.0))
    kind = _kind(header)
    if header.factors is not None:
        if kind != "default":
            raise header.refuse(f"positions of type {kind} with factors ({ROPE_FACTORS}) besides are not read")
        return {"rope_theta": theta, **_llama3(header, theta, config.head_dim)}
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        rope["factor"] = float(settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1.0)))
    if kind == "yarn":
        original = settings.get("rope.scaling.original_context_length", config.max_position_embeddings)
        rope["original_max_position_embeddings"] = int(original)
    return rope


def _kind(header: _Header) -> str:
    written = header.settings.get("rope.scaling.type")
    if written is None:  # old files say the factor alone
        factor = float(header.settings.get("rope.scale_linear", 1.0))
        return "default" if factor == 1.0 else "linear"
    if str(written) not in _ROPE_KINDS:
        raise header.refuse(f"positions of type {written} are not read")
    return _ROPE_KINDS[str(written)]


def _llama3(header: _Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the parameters of Llama 3's stretched positions whose factors are the file's.

    Llama 3 divides frequency w by 1/((1 - s)/f + s), where s = (n·w/2π - low)/(high - low), cut to 0…1; f is the
    factor and n the length before stretching (`_compute_llama3_parameters` of transformers). So s is a line over w
    whose slope and intercept are found from the values between; low, high and n are known up to a common factor, and
    low is 1 in every published model.
    """
    factors = header.factors
    assert factors is not None
    frequencies = theta ** (-2.0 * np.arange(len(factors)) / head_dim)
    factor = float(factors.max())
    if factor == 1.0:
        return {"rope_type": "default"}
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    guesses = [(4.0, 2**power) for power in range(5, 21)]  # too few values between: any that gives these factors
    if between.sum() >= 2:
        slope, intercept = np.polyfit(frequencies[between], smooth[between], 1)
        high = _rounded(1 - 1 / intercept) if intercept < 0 < slope else 4.0
        guesses = [(high, round(slope * (high - 1) * 2 * math.pi))]
    for high, original in guesses:
        found = np.clip((original * frequencies / (2 * math.pi) - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - found) / factor + found), factors, rtol=1e-3):
            break
    else:
        raise header.refuse(f"factors of positions ({ROPE_FACTORS}) that are not Llama 3's are not read")
    return {
        "rope_type": "llama3",
        "factor": _rounded(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _rounded(value: float) -> float:
    """Return the whole number that a value computed in float32 stands for, or the value itself."""
    return float(round(value)) if math.isclose(value, round(value), rel_tol=1e-3) else value


def _refuse_positions(config: Any, header: _Header) -> None:
    """Refuse stretched positions of an architecture if transformers' reader left them out."""
    scaling = str(header.settings.get("rope.scaling.type", "none"))
    stretched = scaling != "none" or any(name.startswith(("rope_freqs", "rope_factors")) for name in header.tensors)
    rope = getattr(config, "rope_parameters", None) or {}
    if stretched and rope.get("rope_type", "default") == "default":
        raise header.refuse(f"the stretched positions of {header.architecture} are not read")
