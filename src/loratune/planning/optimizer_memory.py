"""What optimizers keep from step to step."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.model.targets import Matrix
from loratune.model.variants import num_trainable
from loratune.recipe import LoraSection, Optimizer

BYTES = 4
"""Of one number of the state: float32, as the adapter."""


OF_BITSANDBYTES: tuple[Optimizer, ...] = ("adamw_8bit", "lion")
"""Optimizers that bitsandbytes makes."""

LEAST_IN_8_BITS = 4096
"""Numbers of a parameter from which bitsandbytes keeps its moments in 8 bits."""

_BLOCK = 256
"""Numbers that share a scale there; and the entries of a table."""


def state_bytes(optimizer: Optimizer, matrices: Sequence[Matrix], lora: LoraSection) -> int:
    """Bytes of an optimizer's state for the adapters of these matrices, without a few bytes a tensor for counters.

    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) keeps two moments of each parameter; in 8 bits (Dettmers et al. 2022, arXiv
    2110.02861) a byte for each, with a float for every 256 and two tables, which a checkpoint has for each parameter. Lion
    (Chen et al. 2023, arXiv 2302.06675) and Muon keep one momentum. Adafactor (Shazeer & Stern 2018,
    arXiv 1804.04235), without a first moment as transformers sets it, keeps the second as means over rows and columns: r + d_in
    for A and d_out + r for B; whole for DoRA's magnitudes. SGD has no momentum here and keeps nothing.
    """
    if optimizer == "sgd":
        return 0
    if optimizer in ("lion", "muon"):
        return BYTES * sum(num_trainable(lora, matrix) for matrix in matrices)
    if optimizer == "adamw":
        return BYTES * 2 * sum(num_trainable(lora, matrix) for matrix in matrices)
    if optimizer == "adamw_8bit":
        vectors = [matrix.d_out for matrix in matrices] if lora.variant == "dora" else []
        sides = [lora.r * side for matrix in matrices for side in (matrix.d_in, matrix.d_out)]
        return 2 * sum(_moment_in_8_bits(size) for size in (*sides, *vectors))
    factored = sum(2 * lora.r + matrix.d_in + matrix.d_out for matrix in matrices)
    magnitudes = sum(matrix.d_out for matrix in matrices) if lora.variant == "dora" else 0
    return BYTES * (factored + magnitudes)


def _moment_in_8_bits(size: int) -> int:
    return BYTES * size if size < LEAST_IN_8_BITS else size + BYTES * (-(-size // _BLOCK) + _BLOCK)
