"""What a token costs in a layer of an encoder: BERT, RoBERTa, DistilBERT, ModernBERT and models built like them.

They run transformers' own forward on padded examples, so they save other tensors than decoders. Attention decides the
most: if it applies dropout to its probabilities, torch on a CPU has no fused kernel for it and saves them, and their
size grows with the length of the examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.model.adapter.module_roles import reads_attention
from loratune.planning.memory.adapter import saved_bytes
from loratune.planning.memory.inputs import LayerBytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.model.adapter.targets import Matrix
    from loratune.recipe.recipe import LoraSection

_NORM_STATISTICS_BYTES = 2 * 2 * 4
"""Bytes of a token's mean and deviation in float32, of two norms."""


def encoder_layer_bytes(
    config: Any,
    dtype_bytes: int,
    adapted: Sequence[Matrix],
    *,
    lora: LoraSection,
    longest: int,
    device: str = "cpu",
    fully_trained_saved: int = 0,
) -> LayerBytes:
    """Return the bytes that one token costs in one layer of an encoder (see `decoder_layer_bytes`).

    Saved for the backward pass: the inputs of both norms in the base's type; the masks of dropout; the input of the
    activation and, in a gated feed-forward, its output and the gate; what adapted matrices save; and what attention
    saves (see below). Counted with `saved_tensors_hooks` on BERT, DistilBERT and ModernBERT, the formula is within 1 %
    (`tests/planning/memory/test_encoder.py`).

    Alive for a moment: forward, the feed-forward's tensors; backward, their gradients, or three tensors of the size of
    the attention probabilities.

    Args:
        config: The model's configuration.
        dtype_bytes: Bytes of one frozen weight.
        adapted: The adapted matrices of the whole model.
        lora: Rank, dropout and variant.
        longest: The most tokens that examples are padded to.
        device: cpu, cuda or mps.
        fully_trained_saved: Bytes that modules trained in full save, in the whole model.
    """
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    feed_forward = _first_setting(config, "intermediate_size", "hidden_dim") or 4 * hidden
    gated = hasattr(config, "hidden_activation")  # ModernBERT's name for it, whose feed-forward is gated
    on_cpu = device == "cpu"
    probabilities = heads * longest
    saves_probabilities = on_cpu and bool(_first_setting(config, "attention_probs_dropout_prob", "attention_dropout"))
    saved = dtype_bytes * (2 * hidden + feed_forward * (3 if gated else 1)) + _NORM_STATISTICS_BYTES
    saved += _num_dropouts(config) * hidden * (dtype_bytes if on_cpu else 1)  # a CPU saves masks in the base's type
    if saves_probabilities:
        # In float32, whatever the base's type: query, key and value, and each head's probability for each token of the
        # example before dropout, after it, and its mask.
        saved += 4 * (3 * hidden + 3 * probabilities)
    else:
        # Query, key, value and output, a number a head, and the example's mask as numbers. ModernBERT also saves the
        # product that query, key and value are slices of. An adapted output projection has counted its input already.
        output = 0 if any(reads_attention(item.name) and item.d_in == hidden for item in adapted) else hidden
        saved += dtype_bytes * (hidden * (5 if gated else 3) + output + longest) + 4 * heads
    adapters = fully_trained_saved + saved_bytes(adapted, lora, dtype_bytes)
    width = feed_forward * (3 if gated else 2)
    return LayerBytes(
        saved_for_backward=int(saved + adapters / config.num_hidden_layers),
        input=hidden * dtype_bytes,
        forward=dtype_bytes * (width + 2 * hidden),
        backward=max(dtype_bytes * width, 4 * 3 * probabilities * saves_probabilities) + dtype_bytes * hidden,
        cache=0,
        attention=0,
    )


def _num_dropouts(config: Any) -> int:
    """Return how many masks of the hidden width a layer saves."""
    if _first_setting(config, "hidden_dropout_prob"):
        return 2
    return 1 if _first_setting(config, "dropout", "mlp_dropout") else 0


def _first_setting(config: Any, *names: str) -> Any:
    """Return the first of these settings that the configuration has; None if it has none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
