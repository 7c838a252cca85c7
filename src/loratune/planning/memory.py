"""How much memory a run takes at its peak; the token budget that fits, and how many layers must recompute for it.

The terms, for a model with LoRA:

    weights      parameters × bytes of the base type
    adapter      trainable × 16: float32 weight and gradient, and AdamW's two moments (Loshchilov & Hutter 2019)
    activations  tokens of a micro-batch × what each layer keeps for its backward pass, and one layer's gradients
    loss         chunks of logits: float32, the same in the base type, and one temporary
    process      Python, torch and the libraries themselves
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from loratune.errors import MachineError
from loratune.model.targets import Matrix, reads_attention

PROCESS_BYTES = {"cpu": 900 * 2**20, "cuda": 600 * 2**20, "mps": 600 * 2**20}
"""Resident before any weight is loaded: Python and the libraries. An estimate, rounded up."""

CAPS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Tokens beyond which a larger micro-batch is no faster. On two CPU cores micro-batches of 790, 1,530 and 3,010 tokens ran
at 285 to 297, 279 to 320 and 282 to 308 tokens/s. Those of GPUs are estimates."""

ENOUGH = {"cpu": 512, "cuda": 4096, "mps": 2048}
"""Tokens for which layers are rather recomputed than the micro-batch made smaller. Estimates."""

SHARE = 0.8
"""The part of the free memory that a plan may use; the rest is for what no formula sees."""


TIGHT = 0.6
"""The part of the memory from which on a plan on a CPU is tried before it is trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """What one token costs in one decoder layer.

    Attributes:
        kept: Bytes alive between forward and backward.
        input: Bytes of the layer's input, all that a recomputed layer keeps.
    """

    kept: int
    input: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by component, and the token budget and recomputed layers they were computed for."""

    weights_bytes: int
    adapter_bytes: int
    activation_bytes: int
    loss_bytes: int
    process_bytes: int
    token_budget: int
    num_recomputed: int

    @property
    def peak_bytes(self) -> int:
        """Everything at once."""
        return self.weights_bytes + self.adapter_bytes + self.activation_bytes + self.loss_bytes + self.process_bytes


def layer_bytes(
    config: Any, dtype_bytes: int, adapted: Sequence[Matrix], *, r: int, dropout: float, compiled: bool
) -> LayerBytes:
    """Bytes that one token keeps in one decoder layer, for a Llama-like one with a gated feed-forward.

    The two norms keep their input in float32; attention keeps query, key and value; the feed-forward keeps gate, its
    activation, and up; an adapted matrix keeps its input (shared by those with the same one), a byte of mask for each
    element where there is dropout, and the r-wide product. Compiled, the norms' inputs stay in the base type and the
    activation is recomputed. Frozen matrices keep nothing. Counted with `saved_tensors_hooks` on SmolLM2-135M (balanced and
    complete, with dropout and without, float32 and bfloat16), the formula is within 1 % eager and 0 to 5 % high compiled.

    Args:
        config: The model's text configuration.
        dtype_bytes: Bytes of one frozen weight.
        adapted: The adapted matrices of the whole model.
        r: Rank.
        dropout: Of the adapter's inputs.
        compiled: Whether the layers run compiled.
    """
    hidden = config.hidden_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query = heads * head_dim
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    if getattr(config, "num_experts_per_tok", None):
        feed_forward = config.num_experts_per_tok * (getattr(config, "moe_intermediate_size", None) or feed_forward)
    norms = 2 * hidden * (dtype_bytes if compiled else 4)
    body = norms + dtype_bytes * (query + 2 * key_value + feed_forward * (2 if compiled else 3))
    per_layer = 1 / config.num_hidden_layers
    inputs = {(m.name.rpartition(".")[0], m.d_in, reads_attention(m.name)): m.d_in for m in adapted}
    adapters = dtype_bytes * (sum(inputs.values()) + r * len(adapted))
    if dropout:
        adapters += sum(matrix.d_in for matrix in adapted)
    return LayerBytes(kept=int(body + adapters * per_layer), input=hidden * dtype_bytes)


def plan_memory(
    *,
    total_parameters: int,
    trainable_parameters: int,
    layer: LayerBytes,
    num_layers: int,
    dtype_bytes: int,
    device: str,
    loss_chunk_bytes: int,
    longest: int,
    longest_held_out: int,
    largest_step: int,
    wanted_budget: int | None,
    wanted_recomputed: int | None,
    free: int | None = None,
) -> MemoryPlan:
    """The token budget that fits the free memory, the layers to recompute, and the memory that it takes.

    Args:
        total_parameters: Of base and adapter.
        trainable_parameters: Of the adapter.
        layer: What a token costs in one layer.
        num_layers: Decoder layers.
        dtype_bytes: Bytes of one frozen weight.
        device: cpu, cuda or mps.
        loss_chunk_bytes: Bytes of one chunk of logits in float32.
        longest: Tokens of the longest example: the least that a micro-batch must hold.
        longest_held_out: The same of the held-out examples; 0 where there are none.
        largest_step: Tokens of the largest step: the most that a micro-batch can hold.
        wanted_budget: The recipe's own, or None for auto.
        wanted_recomputed: The recipe's own, or None for auto.
        free: Bytes of a device that is not here; None for what is free on this machine.

    Raises:
        MachineError: Not even one example fits, with every layer recomputed; or a held-out one does not.
    """
    fixed = {
        "weights_bytes": (total_parameters - trainable_parameters) * dtype_bytes,
        "adapter_bytes": trainable_parameters * 16,
        "loss_bytes": loss_chunk_bytes * 2 + loss_chunk_bytes * dtype_bytes // 4,
        "process_bytes": PROCESS_BYTES[device],
    }
    free = free_bytes(device) if free is None else free
    room = int(free * SHARE) - sum(fixed.values())
    least = max(longest, min(wanted_budget or ENOUGH[device], largest_step))
    counts = range(num_layers + 1) if wanted_recomputed is None else (min(wanted_recomputed, num_layers),)
    fitting = [n for n in counts if least * per_token_bytes(layer, num_layers, n) <= room]
    if not fitting:
        least = longest
        fitting = [n for n in counts if least * per_token_bytes(layer, num_layers, n) <= room]
    if not fitting:
        needed = sum(fixed.values()) + longest * per_token_bytes(layer, num_layers, counts[-1])
        raise _does_not_fit(f"one example of {longest:,}", needed, free)
    evaluation = longest_held_out * (layer.kept + 2 * layer.input)  # nothing is kept beyond the layer under way
    if evaluation > room:
        raise _does_not_fit(f"one held-out example of {longest_held_out:,}", sum(fixed.values()) + evaluation, free)
    num_recomputed = fitting[0]
    per_token = per_token_bytes(layer, num_layers, num_recomputed)
    budget = wanted_budget if wanted_budget is not None else max(longest, min(CAPS[device], room // per_token))
    tokens = max(longest, min(budget, largest_step))
    activations = max(tokens * per_token, evaluation)
    return MemoryPlan(**fixed, activation_bytes=activations, token_budget=budget, num_recomputed=num_recomputed)


def _does_not_fit(what: str, needed: int, free: int) -> MachineError:
    return MachineError(
        f"{what} tokens needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free, of which {SHARE:.0%} may be "
        "planned with",
        fix="set a smaller data.max_length, model.dtype: bfloat16, train.recompute: auto, or use a smaller model",
    )


def wants_rehearsal(plan: MemoryPlan, device: str) -> bool:
    """Whether the largest micro-batches should be tried before the first step.

    On a GPU always: it takes a fraction of a second, and what no formula sees (fragments, kernels' work space) is seen. On a
    CPU a micro-batch takes seconds, so only where the plan comes close to the memory that this process can have.
    """
    if device != "cpu":
        return True
    return plan.peak_bytes > TIGHT * (free_bytes(device) + psutil.Process().memory_info().rss)


def per_token_bytes(layer: LayerBytes, num_layers: int, num_recomputed: int) -> int:
    """Bytes that one token needs in all layers: kept activations, and the gradients of the layer under way."""
    kept = (num_layers - num_recomputed) * layer.kept + num_recomputed * layer.input
    under_way = layer.kept * (2 if num_recomputed else 1)
    return kept + under_way


def free_bytes(device: str) -> int:
    """Memory of the device that a new process can have."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
