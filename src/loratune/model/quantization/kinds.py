"""The values of `model.quantization`: which package implements each, and how many weights share a scale."""

from __future__ import annotations

BY_BITSANDBYTES = ("nf4", "int8")
BY_TORCHAO = ("int8_weight_only", "int4_weight_only", "float8_weight_only")

PACKED = (*BY_BITSANDBYTES, *BY_TORCHAO)
"""The kinds whose weights are packed as they load; fp8 is converted afterwards (`fp8`)."""

BLOCK = 64
"""nf4: number of weights that share a scale."""

NESTED_BLOCK = 256
"""nf4: number of scales that share a scale of their own (double quantization)."""

GROUP = 32
"""int4_weight_only: number of weights that share a scale."""


def package_of(quantization: str) -> str | None:
    """Return the package that implements a kind of quantization; None if none is needed."""
    return "bitsandbytes" if quantization in BY_BITSANDBYTES else "torchao" if quantization in BY_TORCHAO else None
