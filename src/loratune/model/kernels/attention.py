"""Causal attention over packed examples: they lie end to end in one row and never attend to each other.

Registered with transformers under the name `PACKED`. The boundaries arrive through the model's forward as
`cu_seq_lens_q` and `max_length_q`, the names that transformers uses for flash attention.

Shapes: T tokens of all examples, H query heads, G key/value heads, D head width, V width of the values, E examples.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.model.kernels.block_attention import block_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKED = "loratune_packed"


class PackingUnsupportedError(RuntimeError):
    """The architecture needs a feature of attention that the packed kernel does not support."""


_mask_only_windows: set[int] | None = None
"""Where `record_mask_only_windows` collects; None outside of it."""


@contextmanager
def record_mask_only_windows() -> Iterator[set[int]]:
    """Collect the windows and chunks, in tokens, that layers enforce by their mask alone, of the models run meanwhile.

    Packed attention has no masks, so it would miss such a window. It applies one that the layer passes as
    `sliding_window`.
    """
    global _mask_only_windows  # noqa: PLW0603 - transformers calls attention and masks, and passes nothing of ours
    _mask_only_windows = set()
    # Only here: with a mask function registered, transformers asks the device at each step whether examples are packed,
    # and waits for the answer.
    AttentionMaskInterface.register(PACKED, _window_as_mask)
    try:
        yield _mask_only_windows
    finally:
        _mask_only_windows = None
        AttentionMaskInterface._global_mapping.pop(PACKED)  # transformers has no public way to unregister


def packed_attention(  # the signature is transformers'
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers' `AttentionInterface` asks for it.

    Args:
        module: The attention module that calls.
        query_1HTD: [1, H, T, D].
        key_1GTD: [1, G, T, D]; H is a multiple of G.
        value_1GTD: [1, G, T, V]; V is D except in DeepSeek's latent attention.
        attention_mask: None, or while windows are recorded a tensor with the window that the mask would enforce.
        scaling: Factor on query·key; 1/√D when None.
        dropout: Attention dropout, zero in the models that people fine-tune.
        cu_seq_lens_q: int32 [E + 1], the boundaries of the examples.
        max_length_q: Tokens of the longest example.
        sliding_window: A token sees itself and the `sliding_window - 1` before it.
        softcap: Scores become softcap · tanh(score / softcap).
        s_aux: [H], frozen attention sinks: one more score per head, whose share of the softmax is discarded (gpt-oss).
        **kwargs: Further arguments of the model; all are ignored but a position bias, which is refused.

    Returns:
        [1, T, H, V], and None for the weights.

    Raises:
        PackingUnsupportedError: No boundaries arrived, or the architecture has a position bias, attention dropout or
            trained sinks.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise PackingUnsupportedError("the model does not pass the examples' boundaries to its attention")
    if kwargs.get("position_bias") is not None:
        raise PackingUnsupportedError("the model's attention has a position bias")
    if s_aux is not None and s_aux.requires_grad:
        raise PackingUnsupportedError("the sinks of the model's attention are trained")
    if dropout:
        raise PackingUnsupportedError(f"the model's attention has dropout {dropout}")
    if _mask_only_windows is not None and attention_mask is not None and int(attention_mask) != sliding_window:
        _mask_only_windows.add(int(attention_mask))
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if query_1HTD.device.type == "cpu":
        scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
        return block_attention(
            query_1HTD, key_1GTD, value_1GTD, cu_seq_lens_q, scale=scale, window=window, softcap=softcap, sinks_H=s_aux
        ), None
    is_plain = softcap is None and s_aux is None and query_1HTD.shape[-1] == value_1GTD.shape[-1]
    if query_1HTD.is_cuda and is_plain and query_1HTD.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query_1HTD, key_1GTD, value_1GTD, cu_seq_lens_q, max_length_q, scaling, window), None
    return _by_example(query_1HTD, key_1GTD, value_1GTD, cu_seq_lens_q, scaling, window, softcap, s_aux), None


def _varlen(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    boundaries: torch.Tensor,
    max_length: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not in every build of torch

    out_THD = varlen_attn(
        query_1HTD[0].transpose(0, 1),
        key_1GTD[0].transpose(0, 1),
        value_1GTD[0].transpose(0, 1),
        boundaries,
        boundaries,
        max_length,
        max_length,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_1HTD.shape[1] != key_1GTD.shape[1],
    )
    assert isinstance(out_THD, torch.Tensor)
    return out_THD[None]


def _by_example(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    boundaries: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attend example by example, on GPUs where `_varlen` does not apply; returns [1, T, H, V]."""
    lengths = [end - start for start, end in pairwise(boundaries.tolist())]
    grouped = query_1HTD.shape[1] != key_1GTD.shape[1]
    outs = []
    # split, not slices: the gradient of each slice would be a tensor of zeros as long as all examples together
    for query, key, value in zip(
        *(torch.split(x, lengths, dim=2) for x in (query_1HTD, key_1GTD, value_1GTD)), strict=True
    ):
        length = query.shape[2]
        if softcap is not None or sinks_H is not None:
            out = _step_by_step(query, key, value, scaling, window, softcap, sinks_H)
        else:
            mask = None if window is None or window >= length else _window_mask(length, window, query.device)
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        outs.append(out)
    return torch.cat(outs, dim=2).transpose(1, 2)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return a boolean [length, length], true where a query (row) may see a key (column)."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _step_by_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attend within one example with the scores held in full, which soft cap and sinks need."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_window_mask(query.shape[2], window, query.device), float("-inf"))
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.to(scores.dtype)[:, None, None].expand(1, -1, query.shape[2], 1)], dim=-1)
        return scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., :-1] @ value
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _window_as_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Return the window of a mask in the mask's place; None for a mask without one, which the boundaries replace."""
    if local_size is None:
        return None
    return torch.full((1, 1, 1, 1), local_size)  # the axes of a mask, which some models slice


def register() -> None:
    """Register `PACKED` with transformers."""
    AttentionInterface.register(PACKED, packed_attention)
