"""The proof by configuration: whether an export computes with its weights what the base does.

Correct weights are of no use if rotary positions, attention scale or normalization are another model's, and with a
small model or short answers such a difference can be too small to see in the outputs. The settings are compared
themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader, GGUFWriter

from loratune.exporting.gguf.model import add_hyperparameters
from loratune.model.gguf_config import ROPE_FACTORS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from loratune.exporting.gguf.architectures import GgufLayout

_FREE = {
    *("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "use_cache"),
    *("quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_experts_implementation"),
    *("id2label", "label2id", "num_labels", "problem_type", "return_dict", "is_encoder_decoder", "auto_map"),
}
"""Settings that do not change what is computed, or that other parts of the certificate compare."""

_NOT_COMPUTED = ("context_length", "vocab_size", "block_count")

_UNLESS_GIVEN = {
    "rope.freq_base": 10000.0,
    "rope.freq_base_swa": 10000.0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
}
"""Settings that a GGUF file may lack → what llama.cpp then computes with. Others follow from the model's sizes."""


def config_differences(base: Any, written: Any) -> list[str]:
    """Return the settings in which two configurations of transformers compute differently, in words.

    Args:
        base: The base's configuration.
        written: The export's.
    """
    return list(_differences(base.to_dict(), written.to_dict(), ""))


def _differences(base: Mapping[str, Any], written: Mapping[str, Any], where: str) -> Iterator[str]:
    for name in sorted(base.keys() | written.keys()):
        one, other = base.get(name), written.get(name)
        if name in _FREE or _equal(one, other):
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{where}{name}.")
        else:
            yield f"{where}{name} is {other!r}, and {one!r} in the base"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def gguf_differences(file: Path, config: Any, layout: GgufLayout, source: Path | None) -> list[str]:
    """Return the settings in which a GGUF file computes differently from the base, in words.

    Args:
        file: The GGUF file of a model.
        config: transformers' configuration of the base.
        layout: The architecture's layout.
        source: The GGUF file that the base was imported from; None for any other base.
    """
    written, factors = _read(file)
    name = layout.family.name
    if written.get("general.architecture") != name:
        return [f"general.architecture is {written.get('general.architecture')!r}, and {name!r} in the base"]
    if source is not None:
        wanted, wanted_factors = _read(source)
    else:
        writer = GGUFWriter(None, name)
        wanted_factors = add_hyperparameters(writer, config, layout).get(ROPE_FACTORS)
        wanted = {key: value.value for values in writer.kv_data for key, value in values.items()}
    differences = []
    for key in sorted(wanted.keys() | written.keys()):
        if key.startswith(f"{name}.") and not key.endswith(_NOT_COMPUTED):
            unless_given = _UNLESS_GIVEN.get(key.removeprefix(f"{name}."))
            one, other = wanted.get(key, unless_given), written.get(key, unless_given)
            if one is not None and other is not None and not _equal(one, other):
                differences.append(f"{key} is {other!r}, and {one!r} in the base")
    if not _same_factors(factors, wanted_factors):
        differences.append(f"the factors of rotary positions ({ROPE_FACTORS}) are not the base's")
    return differences


def _same_factors(one: np.ndarray[Any, Any] | None, other: np.ndarray[Any, Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-3)  # other converters compute them in float32


def _read(file: Path) -> tuple[dict[str, Any], np.ndarray[Any, Any] | None]:
    """Return a GGUF file's metadata without the tokenizer, and its factors of rotary positions; None if it has none."""
    reader = GGUFReader(file)
    values = {entry.name: entry.contents() for entry in reader.fields.values()}
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    return {name: value for name, value in values.items() if not name.startswith("tokenizer.")}, factors
