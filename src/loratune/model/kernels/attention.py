"""Causal attention over examples that lie end to end in one row, which never look at each other.

Registered with transformers under the name `PACKED`. The boundaries come through the model's forward as
`cu_seq_lens_q` and `max_length_q`, the names that transformers uses for flash attention.

Shapes: T tokens of all examples, H query heads, G key/value heads, D head width, E examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.model.kernels.block_attention import block_attention

PACKED = "loratune_packed"


class PackingUnsupportedError(RuntimeError):
    """The architecture needs something of attention that the packed kernel does not do."""


_untold: set[int] | None = None
"""Where windows are collected; see `record_untold_windows`."""


@contextmanager
def record_untold_windows() -> Iterator[set[int]]:
    """The windows and chunks, in tokens, that layers of the models that run meanwhile keep to by their mask alone.

    Packed attention has no masks: transformers makes none for an attention without a mask function. It has one here alone, because
    before transformers calls it, it asks the device whether examples are packed, which a step must not wait for. A window is
    kept to where the layer says so, as `sliding_window`.
    """
    global _untold  # noqa: PLW0603 - transformers calls attention and masks, and passes nothing of ours
    _untold = set()
    AttentionMaskInterface.register(PACKED, _window_as_mask)
    try:
        yield _untold
    finally:
        _untold = None
        AttentionMaskInterface._global_mapping.pop(PACKED)  # there is no public way back


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
    """An attention function for transformers' `AttentionInterface`.

    Args:
        module: The attention module that calls.
        query_1HTD: [1, H, T, D].
        key_1GTD: [1, G, T, D]; H is a multiple of G.
        value_1GTD: [1, G, T, V]; V is D but for DeepSeek's latent attention.
        attention_mask: None: no mask function is registered with it. While windows are recorded, the mask's window.
        scaling: Factor on query·key; 1/√D when None.
        dropout: Attention dropout, zero in the models that people fine-tune.
        cu_seq_lens_q: int32 [E + 1], the boundaries of the examples.
        max_length_q: Tokens of the longest example.
        sliding_window: A token sees itself and the `sliding_window - 1` before it.
        softcap: Scores become softcap · tanh(score / softcap).
        s_aux: [H], attention sinks: a further score of each head, whose share of the softmax goes nowhere. Frozen.
        **kwargs: What else the model passes; a position bias is refused.

    Returns:
        [1, T, H, V], and None for the weights.

    Raises:
        PackingUnsupportedError: No boundaries arrived, or the architecture has a position bias or attention dropout, or its
            sinks are trained.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise PackingUnsupportedError("the model does not hand the examples' boundaries to its attention")
    if kwargs.get("position_bias") is not None:
        raise PackingUnsupportedError("the model's attention has a position bias")
    if s_aux is not None and s_aux.requires_grad:
        raise PackingUnsupportedError("the sinks of the model's attention are trained")
    if dropout:
        raise PackingUnsupportedError(f"the model's attention has dropout {dropout}")
    if _untold is not None and attention_mask is not None and int(attention_mask) != sliding_window:
        _untold.add(int(attention_mask))
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
    lengths = [end - start for start, end in pairwise(boundaries.tolist())]
    grouped = query_1HTD.shape[1] != key_1GTD.shape[1]
    outs = []
    # split, not slices: the gradient of a slice is a row of zeros as long as all examples together
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
    """Boolean [length, length], true where a query (row) may see a key (column)."""
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
    """The boundaries say what a mask would; which window it has is told in its place."""
    if local_size is None:
        return None
    return torch.full((1, 1, 1, 1), local_size)  # with a mask's axes, which some models slice


def register() -> None:
    """Make `PACKED` known to transformers."""
    AttentionInterface.register(PACKED, packed_attention)
