"""What a token costs in a layer of a decoder: Llama, and models built like it (gated feed-forward, grouped queries)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from loratune.model.kernels.block_attention import BLOCK_QUERIES, GPU_BLOCK_QUERIES
from loratune.model.kernels.varlen_attention import varlen_obstacle
from loratune.planning.memory.adapter import saved_bytes
from loratune.planning.memory.inputs import LayerBytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.model.adapter.targets import Matrix
    from loratune.recipe.recipe import LoraSection


def decoder_layer_bytes(
    config: Any,
    dtype_bytes: int,
    adapted: Sequence[Matrix],
    *,
    lora: LoraSection,
    compiled: bool,
    device: str = "cpu",
    keeps_inputs: bool = False,
    fully_trained_saved: int = 0,
) -> LayerBytes:
    """Return the bytes that one token costs in one decoder layer.

    Saved for the backward pass: the two norms' inputs in float32; query, key and value; the feed-forward's gate, its
    activation, and up; and what adapted matrices save (`adapter.saved_bytes`). Frozen matrices save nothing. Counted
    with `saved_tensors_hooks` on SmolLM2-135M (balanced and complete, with and without dropout, float32 and bfloat16),
    the formula is within 1 % eager and 0 to 5 % high compiled.

    Alive for a moment: forward, four tensors of the feed-forward's width besides the residual and its float32 norm;
    backward, three of them and the gradient to the layer (10.5 kB a token measured for SmolLM2-135M in bfloat16, 10.4
    computed), and scores, probabilities and both gradients of one block of queries over an example's keys.

    Args:
        config: The model's text configuration.
        dtype_bytes: Bytes of one frozen weight.
        adapted: The adapted matrices of the whole model.
        lora: Rank, dropout and variant.
        compiled: Whether the layers run compiled.
        device: cpu, cuda or mps.
        keeps_inputs: Whether frozen matrices save their inputs too, as int8 layers of bitsandbytes do.
        fully_trained_saved: Bytes that modules trained in full save, in the whole model.
    """
    hidden = config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 1  # Mamba has none
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query = heads * head_dim
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    feed_forward = _feed_forward_width(config)
    # Compiled, the norms save their inputs in the base's type, and the activation is recomputed.
    norms = 2 * hidden * (dtype_bytes if compiled else 4)
    body = norms + dtype_bytes * (query + 2 * key_value + feed_forward * (2 if compiled else 3))
    queries = BLOCK_QUERIES if device == "cpu" else 0 if _is_flash(config, dtype_bytes, device) else GPU_BLOCK_QUERIES
    if not queries:  # flash attention saves its output and one float32 a head (Dao 2023, arXiv 2307.08691)
        body += dtype_bytes * query + 4 * heads
    adapters = fully_trained_saved + saved_bytes(adapted, lora, dtype_bytes, inputs=not keeps_inputs)
    if keeps_inputs:
        body += dtype_bytes * (2 * hidden + query + feed_forward)
    per_layer = 1 / config.num_hidden_layers
    return LayerBytes(
        saved_for_backward=int(body + adapters * per_layer),
        input=hidden * dtype_bytes,
        forward=dtype_bytes * (4 * feed_forward + hidden) + 4 * hidden,
        backward=dtype_bytes * (3 * feed_forward + hidden),
        cache=dtype_bytes * 2 * key_value,
        attention=4 * dtype_bytes * heads * queries,
    )


def _is_flash(config: Any, dtype_bytes: int, device: str) -> bool:
    """Tell whether attention runs in the varlen kernel, as far as a configuration shows it."""
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return device == "cuda" and not varlen_obstacle(
        torch.float32 if dtype_bytes > 2 else torch.bfloat16,
        width,
        getattr(config, "v_head_dim", None) or width,
        softcap=getattr(config, "attn_logit_softcapping", None),
        has_sinks=getattr(config, "model_type", "") == "gpt_oss",
    )


def _feed_forward_width(config: Any) -> int:
    """Return the width of the feed-forward that a token goes through: of its experts together, of the widest layer."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if isinstance(width, list | tuple):  # one for each layer, as in Gemma 3n
        width = max(width)
    if getattr(config, "num_experts_per_tok", None):
        width = config.num_experts_per_tok * (getattr(config, "moe_intermediate_size", None) or width)
    return int(width)
