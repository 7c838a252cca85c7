"""Seconds that ranks wait for each other's bytes: adding up the adapter's gradients, and gathering a sharded base.

Arithmetic on the links of `interconnect`; no cluster has been measured. Called by `scaling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from loratune.planning.hardware.interconnect import Fabric


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What one rank computes and sends.

    Attributes:
        token_seconds: Seconds of a token, forward and backward, recomputation included.
        num_layers: Layers of the model.
        num_recomputed: How many of them run forward again during the backward pass.
        layer_bytes: Bytes of the frozen weights of a layer.
        gradient_bytes: Bytes of the adapter's gradients.
    """

    token_seconds: float
    num_layers: int
    num_recomputed: int
    layer_bytes: int
    gradient_bytes: int

    @property
    def forward_fraction(self) -> float:
        """The forward pass's part of a token's seconds: 2 of 4 operations a weight, or of 6 if the layer recomputes."""
        return 2 / (4 + 2 * self.num_recomputed / self.num_layers)


def all_reduce_seconds(rank: Rank, fabric: Fabric) -> float:
    """Return the seconds of adding up the adapter's gradients, once a step.

    No computation hides them: the last gradient is ready only when the step's backward pass is done.
    """
    return fabric.all_reduce_seconds(rank.gradient_bytes)


def unhidden_gather_seconds(tokens: np.ndarray, rank: Rank, fabric: Fabric) -> np.ndarray:
    """Return the seconds that micro-batches wait for the frozen base.

    While a layer computes, the next one is gathered (PyTorch's notes on FSDP; Zhao et al. 2023, arXiv 2304.11277,
    section 3.3), so a layer waits only as long as its gather outlasts the computation. The first layer of each pass is
    waited for in full. The output head's computation is counted as if spread evenly over the layers.

    Args:
        tokens: [M], tokens of the heaviest rank in each micro-batch.
        rank: What a rank computes and sends.
        fabric: The ranks and their links.

    Returns:
        Seconds, [M].
    """
    if fabric.size == 1:
        return np.zeros(len(tokens))
    gather = fabric.all_gather_seconds(rank.layer_bytes)
    compute = tokens * rank.token_seconds / rank.num_layers
    forward = compute * rank.forward_fraction
    waits = np.maximum(0, gather - forward) + np.maximum(0, gather - (compute - forward))
    return 2 * gather + (rank.num_layers - 1) * waits


def hiding_tokens(fabric: Fabric, *, flops_per_second: float, bytes_per_weight: float) -> float:
    """Return the tokens of a micro-batch above which a layer's forward pass takes longer than gathering the next layer.

    2·P operations a token at R a second, against (n−1)/n · b·P bytes at B a second. P, the layer's parameters, cancels:

        tokens = (n−1)/n · b/2 · R/B

    Latency is left out, and the backward pass takes as long as the forward pass (or longer, if layers are recomputed).

    Args:
        fabric: n ranks, and B.
        flops_per_second: R, the operations per second that a device reaches.
        bytes_per_weight: b, bytes of one weight of the frozen base.
    """
    n = fabric.size
    return (n - 1) / n * bytes_per_weight / 2 * flops_per_second / fabric.bytes_per_second
