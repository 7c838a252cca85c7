"""What a token costs in a layer of an encoder: BERT, RoBERTa, DistilBERT, ModernBERT, and their kin.

They run transformers' own forward on padded examples, so other tensors are kept than in decoders. Attention decides the most: where
it drops probabilities, torch on a CPU has no kernel for it and keeps them, which grows with the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratune.model.adapter.module_roles import reads_attention
from loratune.model.adapter.targets import Matrix
from loratune.planning.memory.adapter import kept_bytes
from loratune.planning.memory.memory import LayerBytes
from loratune.recipe.recipe import LoraSection

_OF_NORMS = 2 * 2 * 4
"""Mean and deviation of a token, of two norms."""


def encoder_layer_bytes(
    config: Any,
    dtype_bytes: int,
    adapted: Sequence[Matrix],
    *,
    lora: LoraSection,
    longest: int,
    device: str = "cpu",
    whole_kept: int = 0,
) -> LayerBytes:
    """Bytes that one token costs in one layer, as `layer_bytes` says it of decoders.

    Kept: the inputs of both norms in the base's type; a mask for each element that is dropped out of, on a CPU in the base's type too; the
    input of the activation, and, where the feed-forward is gated, its output and the gate. Attention keeps query, key, value, its output,
    a number a head, and the example's mask as numbers; that of ModernBERT the product too that they were cut from. On a CPU with dropout
    of probabilities it keeps instead, in float32 whatever the base is: query, key, value, and for each token of the example and each head
    the probability before and after dropout and the mask. Adapted matrices keep what `kept_bytes` says; attention's output is kept once.
    Counted with `saved_tensors_hooks` on BERT, DistilBERT and ModernBERT, the formula is within 1 %
    (`tests/planning/memory/test_encoder.py`).

    Alive for a moment: forward, the feed-forward's tensors; backward, their gradients, or three tensors of the probabilities' size.

    Args:
        config: The model's configuration.
        dtype_bytes: Bytes of one frozen weight.
        adapted: The adapted matrices of the whole model.
        lora: Rank, dropout and variant.
        longest: Tokens that examples are padded to, at most.
        device: cpu, cuda or mps.
        whole_kept: What modules that are trained whole keep, in the whole model.
    """
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    feed_forward = _first(config, "intermediate_size", "hidden_dim") or 4 * hidden
    gated = hasattr(config, "hidden_activation")  # as ModernBERT names it, whose feed-forward is
    on_cpu = device == "cpu"
    masks = 2 if _first(config, "hidden_dropout_prob") else 1 if _first(config, "dropout", "mlp_dropout") else 0
    probabilities = heads * longest
    by_products = on_cpu and bool(_first(config, "attention_probs_dropout_prob", "attention_dropout"))
    kept = dtype_bytes * (2 * hidden + feed_forward * (3 if gated else 1)) + _OF_NORMS
    kept += masks * hidden * (dtype_bytes if on_cpu else 1)
    if by_products:
        kept += 4 * (3 * hidden + 3 * probabilities)
    else:
        output = 0 if any(reads_attention(item.name) and item.d_in == hidden for item in adapted) else hidden
        kept += dtype_bytes * (hidden * (5 if gated else 3) + output + longest) + 4 * heads
    adapters = whole_kept + kept_bytes(adapted, lora, dtype_bytes)
    width = feed_forward * (3 if gated else 2)
    return LayerBytes(
        saved_for_backward=int(kept + adapters / config.num_hidden_layers),
        input=hidden * dtype_bytes,
        forward=dtype_bytes * (width + 2 * hidden),
        backward=max(dtype_bytes * width, 4 * 3 * probabilities * by_products) + dtype_bytes * hidden,
        cache=0,
        attention=0,
    )


def _first(config: Any, *names: str) -> Any:
    """The first of these settings that the configuration has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
