"""Causal attention of packed examples on an NVIDIA GPU: torch's `varlen_attn`, a FlashAttention.

No GPU has run this file yet. Its arguments, and what becomes of heads that share keys, are tested on a CPU with a
substitute for `varlen_attn` in the signature of torch 2.11 and of torch 2.12.

Shapes: T tokens of all examples, H query heads, G key/value heads, D head width, E examples.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.varlen import varlen_attn

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_WIDTH = 256
"""The widest head that FlashAttention 2 supports."""

MULTIPLE = 8
"""FlashAttention 2 needs head widths that are multiples of this."""

CAPABILITY = (8, 0)
"""The lowest CUDA compute capability that FlashAttention 2 supports."""


def takes_shared_heads(attention: Callable[..., Any]) -> bool:
    """Tell whether this `varlen_attn` lets query heads share a key/value head: that of torch 2.12 and later."""
    return "enable_gqa" in inspect.signature(attention).parameters


_TAKES_SHARED_HEADS = takes_shared_heads(varlen_attn)


def machine_obstacle() -> str:
    """Return why this machine's GPU cannot run the kernel; empty if it can, or if there is none."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (SM {major}.{minor}) is older than SM 8.0"
    return ""


def varlen_obstacle(dtype: torch.dtype, width: int, value_width: int, *, softcap: float | None, has_sinks: bool) -> str:
    """Return why the kernel cannot compute an attention of this form; empty if it can.

    Args:
        dtype: Type of query, key and value.
        width: Width of a query's head.
        value_width: Width of a value's head.
        softcap: Soft cap of the scores.
        has_sinks: Whether heads have attention sinks.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no {str(dtype).removeprefix('torch.')}"
    if softcap is not None:
        return "the scores have a soft cap"
    if has_sinks:
        return "the heads have sinks"
    if width != value_width:
        return f"queries are {width} wide and values {value_width}"
    if width % MULTIPLE or width > MAX_WIDTH:
        return f"heads are {width} wide, not a multiple of {MULTIPLE} up to {MAX_WIDTH}"
    return ""


def varlen_attention(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    boundaries: torch.Tensor,
    max_length: int,
    *,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend within each example; return [1, T, H, D], with gradients to query, key and value.

    Args:
        query_1HTD: [1, H, T, D].
        key_1GTD: [1, G, T, D]; H is a multiple of G.
        value_1GTD: [1, G, T, D].
        boundaries: int32 [E + 1], on the device; example e occupies tokens boundaries[e] to boundaries[e + 1].
        max_length: Tokens of the longest example.
        scale: Factor on query·key; 1/√D when None.
        window: A token sees itself and the `window - 1` before it.
    """
    query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1GTD, value_1GTD))
    shared = query_THD.shape[1] // key_TGD.shape[1]
    arguments: dict[str, Any] = {}
    if shared > 1 and _TAKES_SHARED_HEADS:
        arguments["enable_gqa"] = True
    elif shared > 1:
        # torch 2.11 documents no shared heads; expanded, keys and values take `shared` times the memory while the
        # layer's activations are kept.
        key_TGD, value_TGD = (x.repeat_interleave(shared, dim=1) for x in (key_TGD, value_TGD))
    # Not compared with the longest example: the comparison would compile a second graph.
    out_THD = varlen_attn(
        query_THD,
        key_TGD,
        value_TGD,
        boundaries,
        boundaries,
        max_length,
        max_length,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **arguments,
    )
    assert isinstance(out_THD, torch.Tensor)
    return out_THD[None]
