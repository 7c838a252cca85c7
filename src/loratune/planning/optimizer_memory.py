"""What optimizers keep from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratune.model.patterns import rank_of
from loratune.model.targets import Matrix
from loratune.model.variants import num_trainable
from loratune.recipe import LoraSection, Optimizer

BYTES = 4
"""Of one number of the state: float32, as the adapter."""


def state_bytes(
    optimizer: Optimizer, matrices: Sequence[Matrix], lora: LoraSection, whole: Sequence[Sequence[int]] = ()
) -> int:
    """Bytes of an optimizer's state for the adapters of these matrices, without a few bytes a tensor for counters.

    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) keeps two moments of each parameter. Adafactor (Shazeer & Stern 2018,
    arXiv 1804.04235), without a first moment as transformers sets it, keeps the second as means over rows and columns: r + d_in
    for A and d_out + r for B; whole for vectors such as DoRA's magnitudes. SGD has no momentum here and keeps nothing.

    Args:
        optimizer: Of the recipe.
        matrices: That are adapted.
        lora: Ranks and variant.
        whole: Shapes of tensors that are trained whole.
    """
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return BYTES * 2 * (sum(num_trainable(lora, matrix) for matrix in matrices) + sum(map(math.prod, whole)))
    factored = sum(2 * rank_of(lora, matrix.name) * matrix.count + matrix.d_in + matrix.d_out for matrix in matrices)
    magnitudes = sum(matrix.d_out for matrix in matrices) if lora.variant == "dora" else 0
    others = sum(
        math.prod(shape[:-2]) * (shape[-2] + shape[-1]) if len(shape) > 1 else math.prod(shape) for shape in whole
    )
    return BYTES * (factored + magnitudes + others)
