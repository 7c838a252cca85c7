"""Which other programs can load the adapter by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"\.\d+\.")


def unknown_to_gguf(targets: Sequence[str]) -> tuple[str, ...]:
    """The adapted modules that no architecture of llama.cpp has, as `model.layers.{bid}.odd`.

    llama.cpp's converter of adapters looks each module up by name in the tables of the `gguf` package.

    Args:
        targets: Full module names.
    """
    known = set(_names_in_gguf())
    return tuple(name for name in dict.fromkeys(map(_template, targets)) if name not in known)


def _names_in_gguf() -> Iterator[str]:
    from gguf.tensor_mapping import TensorNameMap

    # The tables are read, not asked: making a TensorNameMap of an architecture changes those of all others for good.
    for table in (TensorNameMap.block_mappings_cfg, *TensorNameMap.arch_block_mappings_cfg.values()):
        for names in table.values():
            yield from names


def _template(name: str) -> str:
    """The name as the tables have it: layers by number, experts as one, towers of other modalities split off."""
    name = _EXPERT.sub(".experts.", name.replace("language_model.", ""))
    return _LAYER.sub(".{bid}.", name, count=1)
