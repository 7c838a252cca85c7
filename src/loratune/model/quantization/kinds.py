"""model.quantization.kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


BY_BITSANDBYTES = ("nf4", "int8")


BY_TORCHAO = ("int8_weight_only", "int4_weight_only", "float8_weight_only")


PACKED = (*BY_BITSANDBYTES, *BY_TORCHAO)
"""The kinds whose weights are packed while they load."""


BLOCK = 64
"""Weights that share a scale in nf4."""


NESTED_BLOCK = 256
"""Scales that share a scale of their own."""


GROUP = 32
"""Weights that share a scale in int4_weight_only."""


def package_of(quantization: str) -> str | None:
    """The package that quantises; None where none is needed."""
    return "bitsandbytes" if quantization in BY_BITSANDBYTES else "torchao" if quantization in BY_TORCHAO else None
