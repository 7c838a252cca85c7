"""Causal attention over packed examples: they lie end to end in one row and never attend to each other.

Where examples share their prefixes, segments lie in the row, and each attends to itself and those before it.

Registered with transformers under the name `PACKED`. The boundaries arrive through the model's forward as
`cu_seq_lens_q` and `max_length_q`, the names that transformers uses for flash attention.

Shapes: T tokens of all examples, H query heads, G key/value heads, D head width, V width of the values, E examples.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.model.kernels import varlen_attention as varlen
from loratune.model.kernels.block_attention import block_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKED = "loratune_packed"


class PackingUnsupportedError(RuntimeError):
    """The architecture needs a feature of attention that the packed kernel does not support."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What the packed attention of a model was seen to need.

    Attributes:
        mask_only_windows: Windows and chunks, in tokens, that layers enforce by their mask alone.
        slow_because: Why layers cannot use the fastest kernel of this device; empty if all do.
    """

    mask_only_windows: set[int] = field(default_factory=set)
    slow_because: set[str] = field(default_factory=set)


_observed: Observed | None = None
"""Where `observe_attention` collects; None outside of it."""

_machine_obstacle = ""
"""Why this machine's GPU does not run the varlen kernel, from `register`."""


@contextmanager
def observe_attention() -> Iterator[Observed]:
    """Collect what the attention of the models that run meanwhile needs.

    Packed attention has no masks, so it would miss a window that only a mask enforces. It applies one that the layer
    passes as `sliding_window`.
    """
    global _observed  # noqa: PLW0603 - transformers calls attention and masks, and passes nothing of ours
    _observed = Observed()
    # Only here: with a mask function registered, transformers asks the device at each step whether examples are packed,
    # and waits for the answer.
    AttentionMaskInterface.register(PACKED, _window_as_mask)
    try:
        yield _observed
    finally:
        _observed = None
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
    cu_seq_lens_k: torch.Tensor | None = None,
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
        cu_seq_lens_k: The same on the host, for kernels that read them there; None: they wait for `cu_seq_lens_q`. Or a
            tree of segments, int32 [2, segments + 1] (`block_attention`), which only the blocks support.
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
    _check_supported(dropout, s_aux, kwargs.get("position_bias"))
    if _observed is not None:
        _observe_mask(_observed, attention_mask, sliding_window)
    heads = (query_1HTD, key_1GTD, value_1GTD)
    is_tree = cu_seq_lens_k is not None and cu_seq_lens_k.dim() == 2
    if _is_on_gpu(query_1HTD) and not (is_tree or _noted(_gpu_obstacle(query_1HTD, value_1GTD, softcap, s_aux))):
        window = sliding_window
        return varlen.varlen_attention(*heads, cu_seq_lens_q, max_length_q, scale=scaling, window=window), None
    boundaries = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    return block_attention(*heads, boundaries, scale=scale, window=sliding_window, softcap=softcap, sinks_H=s_aux), None


def _check_supported(dropout: float, sinks_H: torch.Tensor | None, position_bias: torch.Tensor | None) -> None:
    if position_bias is not None:
        raise PackingUnsupportedError("the model's attention has a position bias")
    if sinks_H is not None and sinks_H.requires_grad:
        raise PackingUnsupportedError("the sinks of the model's attention are trained")
    if dropout:
        raise PackingUnsupportedError(f"the model's attention has dropout {dropout}")


def _observe_mask(observed: Observed, attention_mask: torch.Tensor | None, sliding_window: int | None) -> None:
    if attention_mask is not None and int(attention_mask) != sliding_window:
        observed.mask_only_windows.add(int(attention_mask))


def _gpu_obstacle(
    query_1HTD: torch.Tensor, value_1GTD: torch.Tensor, softcap: float | None, sinks_H: torch.Tensor | None
) -> str:
    """Return why the varlen kernel cannot compute this attention on this machine; empty if it can."""
    widths = query_1HTD.shape[-1], value_1GTD.shape[-1]
    return _machine_obstacle or varlen.varlen_obstacle(
        query_1HTD.dtype, *widths, softcap=softcap, has_sinks=sinks_H is not None
    )


def _noted(obstacle: str) -> str:
    """Return the obstacle, and keep it while attention is observed."""
    if obstacle and _observed is not None:
        _observed.slow_because.add(obstacle)
    return obstacle


def _is_on_gpu(query_1HTD: torch.Tensor) -> bool:
    """Tell whether the varlen kernel is this device's fastest; tests replace it to reach that kernel without a GPU."""
    return query_1HTD.is_cuda


def _window_as_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Return the window of a mask in the mask's place; None for a mask without one, which the boundaries replace."""
    if local_size is None:
        return None
    return torch.full((1, 1, 1, 1), local_size)  # the axes of a mask, which some models slice


def register() -> None:
    """Register `PACKED` with transformers, and find out whether the GPU runs the varlen kernel."""
    global _machine_obstacle  # noqa: PLW0603 - asked once, outside of compiled code
    _machine_obstacle = varlen.machine_obstacle()
    AttentionInterface.register(PACKED, packed_attention)
