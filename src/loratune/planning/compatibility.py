"""Which other programs can load the adapter by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"\.\d+\.")


def unknown_to_gguf(targets: Sequence[str]) -> tuple[str, ...]:
    """The adapted modules that no architecture of llama.cpp has, without their layers' numbers.

    llama.cpp's converter of adapters looks each module up by name in the tables of the `gguf` package.

    Args:
        targets: Full module names.
    """
    import gguf

    tables = [gguf.get_tensor_name_map(architecture, 1) for architecture in gguf.MODEL_ARCH]
    return tuple(
        name for name in dict.fromkeys(map(_first_layer, targets)) if not any(table.get_name(name) for table in tables)
    )


def _first_layer(name: str) -> str:
    """The name as it is in the first layer; experts are stacked there, and towers of other modalities are split off."""
    name = _EXPERT.sub(".experts.", name.replace("language_model.", ""))
    return _LAYER.sub(".0.", name)
