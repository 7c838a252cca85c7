"""How much memory a run takes at its peak, and the token budget that fits.

The terms, for a model with LoRA and nothing recomputed:

    weights      parameters × bytes of the base type
    adapter      trainable × 16: float32 weight and gradient, and AdamW's two moments (Loshchilov & Hutter 2019)
    activations  tokens of a micro-batch × what one layer keeps for its backward pass × layers
    loss         three chunks of logits, float32 (the logits, one temporary, one product)
    process      Python, torch and the libraries themselves
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from loratune.errors import MachineError

PROCESS_BYTES = {"cpu": 900 * 2**20, "cuda": 600 * 2**20, "mps": 600 * 2**20}
"""Resident before any weight is loaded: Python and the libraries. An estimate, rounded up."""

CAPS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Tokens beyond which a larger micro-batch is no faster. On two CPU cores micro-batches of 790, 1,530 and 3,010 tokens ran
at 285 to 297, 279 to 320 and 282 to 308 tokens/s. Those of GPUs are estimates."""

SHARE = 0.8
"""The part of the free memory that a plan may use; the rest is for what no formula sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by component, and the token budget they were computed for."""

    weights_bytes: int
    adapter_bytes: int
    activation_bytes: int
    loss_bytes: int
    process_bytes: int
    token_budget: int

    @property
    def peak_bytes(self) -> int:
        """Everything at once."""
        return self.weights_bytes + self.adapter_bytes + self.activation_bytes + self.loss_bytes + self.process_bytes


def activation_bytes_per_token(config: Any, dtype_bytes: int, num_adapted: int, r: int) -> int:
    """Bytes that one token keeps alive between forward and backward.

    Per layer, in widths of the base type: the two norms keep input and normalised input (4 hidden), attention keeps
    query, key, value before and after rotation and its output (2·(q + 2·kv) + q), the residual additions nothing, and
    the gated feed-forward keeps gate, up, the activation and the product (4 intermediate). An adapted matrix keeps its
    dropped-out input, its mask (1 byte) and the r-wide product in float32.
    """
    hidden = config.hidden_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query = heads * head_dim
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = 4 * hidden + 2 * (query + 2 * key_value) + query + 4 * intermediate
    adapters = num_adapted * (5 * hidden + 8 * r)
    return int(config.num_hidden_layers * layer * dtype_bytes + adapters)


def plan_memory(
    *,
    total_parameters: int,
    trainable_parameters: int,
    num_adapted: int,
    r: int,
    config: Any,
    dtype_bytes: int,
    device: str,
    loss_chunk_bytes: int,
    longest: int,
    largest_step: int,
    wanted_budget: int | None,
    free: int | None = None,
) -> MemoryPlan:
    """The token budget that fits the free memory, and the memory that it takes.

    Args:
        total_parameters: Of base and adapter.
        trainable_parameters: Of the adapter.
        num_adapted: Adapted matrices.
        r: Rank.
        config: The model's text configuration.
        dtype_bytes: Bytes of one frozen weight.
        device: cpu, cuda or mps.
        loss_chunk_bytes: Bytes of one chunk of logits.
        longest: Tokens of the longest example: the least that a micro-batch must hold.
        largest_step: Tokens of the largest step: the most that a micro-batch can hold.
        wanted_budget: The recipe's own, or None for auto.
        free: Bytes of a device that is not here; None for what is free on this machine.

    Raises:
        MachineError: Not even one example fits.
    """
    fixed = {
        "weights_bytes": (total_parameters - trainable_parameters) * dtype_bytes,
        "adapter_bytes": trainable_parameters * 16,
        "loss_bytes": 3 * loss_chunk_bytes,
        "process_bytes": PROCESS_BYTES[device],
    }
    per_token = activation_bytes_per_token(config, dtype_bytes, num_adapted, r)
    free = free_bytes(device) if free is None else free
    room = int(free * SHARE) - sum(fixed.values())
    if room < longest * per_token:
        needed = sum(fixed.values()) + longest * per_token
        raise MachineError(
            f"one example of {longest:,} tokens needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            fix="set a smaller data.max_length, model.dtype: bfloat16, or use a smaller model",
        )
    budget = wanted_budget if wanted_budget is not None else max(longest, min(CAPS[device], room // per_token))
    tokens = max(longest, min(budget, largest_step))
    return MemoryPlan(**fixed, activation_bytes=tokens * per_token, token_budget=budget)


def free_bytes(device: str) -> int:
    """Memory of the device that a new process can have."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
