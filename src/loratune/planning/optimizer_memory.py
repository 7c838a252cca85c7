"""What optimizers keep from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from loratune.model.targets import Matrix
from loratune.model.variants import num_trainable
from loratune.recipe import LoraSection, Optimizer

BYTES = 4
"""Of one number of the state: float32, as the adapter."""


def state_bytes(
    optimizer: Optimizer, matrices: Sequence[Matrix], lora: LoraSection, whole: Iterable[tuple[int, ...]] = ()
) -> int:
    """Bytes of an optimizer's state for the adapters of these matrices, without a few bytes a tensor for counters.

    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) keeps two moments of each parameter. Adafactor (Shazeer & Stern 2018,
    arXiv 1804.04235), without a first moment as transformers sets it, keeps the second as means over rows and columns: r + d_in
    for A and d_out + r for B; whole for DoRA's magnitudes. SGD has no momentum here and keeps nothing. `whole`: the shapes of
    parameters that are trained themselves.
    """
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return BYTES * 2 * (sum(num_trainable(lora, matrix) for matrix in matrices) + sum(map(math.prod, whole)))
    factored = sum(2 * lora.r + matrix.d_in + matrix.d_out for matrix in matrices)
    magnitudes = sum(matrix.d_out for matrix in matrices) if lora.variant == "dora" else 0
    others = sum(sum(shape) for shape in whole)  # of a vector, its length
    return BYTES * (factored + magnitudes + others)
