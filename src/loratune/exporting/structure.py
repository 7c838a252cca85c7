"""The proof by configuration: whether an export computes with its weights what the base does.

Weights that are right serve nobody if rotary positions, attention scale or normalization are another model's, and with
a small model or short answers such a difference can be too small to see in the outputs. The settings are compared
themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gguf import GGUFReader, GGUFWriter

from loratune.exporting.gguf.model import add_hyperparameters

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
    written = _values(file)
    name = layout.family.name
    if written.get("general.architecture") != name:
        return [f"general.architecture is {written.get('general.architecture')!r}, and {name!r} in the base"]
    if source is not None:
        wanted = _values(source)
    else:
        writer = GGUFWriter(None, name)
        add_hyperparameters(writer, config, layout)
        wanted = {key: value.value for values in writer.kv_data for key, value in values.items()}
    return [
        f"{key} is {written[key]!r}, and {wanted[key]!r} in the base"
        for key in sorted(wanted)
        if key.startswith(f"{name}.") and key in written and not key.endswith(_NOT_COMPUTED)
        if not _equal(wanted[key], written[key])
    ]


def _values(file: Path) -> dict[str, Any]:
    fields = GGUFReader(file).fields.values()
    return {field.name: field.contents() for field in fields if not field.name.startswith("tokenizer.")}
