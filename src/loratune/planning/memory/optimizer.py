"""What optimizers keep from step to step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratune.model.adapter.patterns import rank_of
from loratune.model.adapter.variants import num_trainable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.model.adapter.targets import Matrix
    from loratune.recipe.recipe import LoraSection, Optimizer

STATE_BYTES_PER_NUMBER = 4
"""Bytes of one number of the state: float32, as the adapter."""

OF_BITSANDBYTES: tuple[Optimizer, ...] = ("adamw_8bit", "lion")
"""Optimizers that bitsandbytes implements."""

MIN_NUMBERS_IN_8_BITS = 4096
"""The fewest numbers of a parameter for which bitsandbytes keeps moments in 8 bits."""

_BLOCK = 256
"""How many 8-bit numbers share a scale, and how many entries a quantization table has."""


def state_bytes(
    optimizer: Optimizer, matrices: Sequence[Matrix], lora: LoraSection, whole: Sequence[Sequence[int]] = ()
) -> int:
    """Return the bytes of an optimizer's state, apart from a few bytes a tensor for counters.

    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) keeps two moments of each parameter; in 8 bits (Dettmers et al.
    2022, arXiv 2110.02861) a byte for each, with a float for every 256 and two tables, which a checkpoint stores for
    each parameter. Lion (Chen et al. 2023, arXiv 2302.06675) and Muon keep one momentum. Adafactor (Shazeer & Stern
    2018, arXiv 1804.04235), without a first moment as transformers configures it, keeps the second as means over rows
    and columns: r + d_in for A and d_out + r for B; in full for vectors such as DoRA's magnitudes. SGD runs without
    momentum here and keeps nothing.

    Args:
        optimizer: The recipe's `train.optimizer`.
        matrices: The adapted matrices.
        lora: Ranks and variant.
        whole: Shapes of tensors trained in full.
    """
    if optimizer == "sgd":
        return 0
    numbers = sum(num_trainable(lora, matrix) for matrix in matrices) + sum(map(math.prod, whole))
    if optimizer in ("lion", "muon"):
        return STATE_BYTES_PER_NUMBER * numbers
    if optimizer == "adamw":
        return STATE_BYTES_PER_NUMBER * 2 * numbers
    vectors = [matrix.d_out for matrix in matrices] if lora.variant == "dora" else []
    if optimizer == "adamw_8bit":
        sides = [
            rank_of(lora, matrix.name) * matrix.count * side
            for matrix in matrices
            for side in (matrix.d_in, matrix.d_out)
        ]
        return 2 * sum(_moment_in_8_bits(size) for size in (*sides, *vectors, *map(math.prod, whole)))
    factored = sum(2 * rank_of(lora, matrix.name) * matrix.count + matrix.d_in + matrix.d_out for matrix in matrices)
    others = sum(
        math.prod(shape[:-2]) * (shape[-2] + shape[-1]) if len(shape) > 1 else math.prod(shape) for shape in whole
    )
    return STATE_BYTES_PER_NUMBER * (factored + sum(vectors) + others)


def _moment_in_8_bits(size: int) -> int:
    """Return the bytes of one moment of a parameter of `size` numbers."""
    if size < MIN_NUMBERS_IN_8_BITS:
        return STATE_BYTES_PER_NUMBER * size
    return size + STATE_BYTES_PER_NUMBER * (-(-size // _BLOCK) + _BLOCK)
