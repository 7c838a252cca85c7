"""Causal attention of packed examples in blocks of queries: two custom operators, forward and backward.

Examples may share their prefixes: the micro-batch then consists of segments, and a block's keys are those of the
segments before its own, end to end. A block's queries are the last of its keys either way.

They serve a CPU, whose own attention in torch is slow in the bfloat16 backward pass, and on a GPU every attention that
`varlen_attention` cannot compute: float32, soft caps, sinks, values of another width. A loop over examples does not
compile, so it is inside the operators. These are batched matrix products over the key/value heads and a softmax; only
query, key and value are saved for the backward pass, so memory grows with the longest example, not with its square.

Shapes: T tokens of all examples, H query heads, G key/value heads, D head width, K keys that a block sees; V width of
the values, which is D except in DeepSeek's latent attention; R = T · H/G rows: the query heads that share a key/value
head lie side by side, so that a block of queries is a slice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_QUERIES = 192
"""Largest number of queries in a block. Forward and backward of examples of 160, 512 and 1,024 tokens (9 heads of 64,
bfloat16, two Zen 4 cores) took 25, 39 and 44 ms in blocks of 64; 23, 41 and 38 ms in blocks of 128; 20, 51 and 38 ms in
blocks of 256; torch's attention took 49, 57 and 54 ms."""

GPU_BLOCK_QUERIES = 512
"""The same on a GPU, where each product is a launch. An estimate: no GPU has run it."""


def block_attention(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    boundaries: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend within each example; return [1, T, H, V], with gradients to query, key and value.

    Scores are rounded to the type of the query, as in transformers' eager attention; the softmax is computed in
    float32.

    Args:
        query_1HTD: [1, H, T, D].
        key_1GTD: [1, G, T, D]; H is a multiple of G.
        value_1GTD: [1, G, T, V].
        boundaries: int32 [examples + 1]; example e occupies tokens boundaries[e] to boundaries[e + 1]. Or int32
            [2, segments + 1]: the boundaries of segments, and the number of the segment before each, -1 for none. On
            the host, or the host waits for the device.
        scale: Factor on query·key.
        window: A token sees itself and the `window - 1` before it.
        softcap: Scores become softcap · tanh(score / softcap).
        sinks_H: [H], frozen: one more score per head, whose share of the softmax is discarded (gpt-oss).
    """
    _, heads, tokens, width = query_1HTD.shape
    groups = key_1GTD.shape[1]
    shared = heads // groups
    query_GRD = (query_1HTD[0] * scale).view(groups, shared, tokens, width).transpose(1, 2).flatten(1, 2)
    out_GRD: torch.Tensor = _forward(
        query_GRD, key_1GTD[0], value_1GTD[0], boundaries, shared, window or 0, softcap or 0.0, sinks_H
    )
    return out_GRD.view(groups, tokens, shared, -1).transpose(0, 1).reshape(1, tokens, heads, -1)


@torch.library.custom_op("loratune::block_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    shared: int,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Map query [G, R, D] (already scaled), key [G, T, D] and value [G, T, V] to [G, R, V]; `shared` is H/G."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out, most = query.new_empty(*query.shape[:2], value.shape[2]), _most_queries(query.device)
    for rows, keys in _blocks(boundaries, shared, window, most):
        probs, _ = _probabilities(query[:, rows], _joined(key, keys), shared, window, softcap, sinks)
        out[:, rows] = torch.bmm(probs, _joined(value, keys))
    return out


@_forward.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    shared: int,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])


@torch.library.custom_op("loratune::block_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    shared: int,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, query, key, value = grad.contiguous(), query.contiguous(), key.contiguous(), value.contiguous()
    grad_query = torch.empty_like(query)
    most = _most_queries(query.device)
    blocks = list(_blocks(boundaries, shared, window, most))
    # Several blocks of an example, or several segments, add to the same keys; in bfloat16 each addition would round.
    has_children = boundaries.dim() == 2 and int(boundaries[1].max()) >= 0
    adds = has_children or len(blocks) > boundaries.shape[-1] - 1
    wide = torch.promote_types(query.dtype, torch.float32) if adds else query.dtype
    grad_key, grad_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
    for rows, keys in blocks:
        keys_GKD = _joined(key, keys)
        probs, slope = _probabilities(query[:, rows], keys_GKD, shared, window, softcap, sinks)
        _add(grad_value, keys, torch.bmm(probs.mT, grad[:, rows]))
        grad_probs = torch.bmm(grad[:, rows], _joined(value, keys).mT)
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        if slope is not None:
            grad_scores *= slope
        _add(grad_key, keys, torch.bmm(grad_scores.mT, query[:, rows]))
        grad_query[:, rows] = torch.bmm(grad_scores, keys_GKD)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    shared: int,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4], inputs[7])
    ctx.settings = inputs[4:7]


def _differentiate(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    return (*_backward(grad_out, *tensors, *ctx.settings, sinks), None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _most_queries(device: torch.device) -> int:
    return BLOCK_QUERIES if device.type == "cpu" else GPU_BLOCK_QUERIES


def _blocks(boundaries: torch.Tensor, shared: int, window: int, most: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield blocks of about equal size: rows of queries, and the runs of tokens whose keys they see."""
    for before, start, stop in _segments(boundaries):
        num_blocks = -(-(stop - start) // most)
        for i in range(num_blocks):
            first, end = (start + (stop - start) * j // num_blocks for j in (i, i + 1))
            path = _append(before, start, end)
            yield slice(first * shared, end * shared), _last(path, end - first + window - 1) if window else path


def _segments(boundaries: torch.Tensor) -> Iterator[tuple[list[slice], int, int]]:
    """Yield for each segment the runs of tokens before it, its first token and its end."""
    if boundaries.dim() == 1:
        for start, stop in pairwise(boundaries.tolist()):
            yield [], start, stop
        return
    ends, parents = boundaries.tolist()
    paths: list[list[slice]] = []
    for (start, stop), parent in zip(pairwise(ends), parents, strict=False):
        before = paths[parent] if parent >= 0 else []
        paths.append(_append(before, start, stop))
        yield before, start, stop


def _append(path: list[slice], start: int, stop: int) -> list[slice]:
    """Return a path that goes on with these tokens. A first child lies next to its parent, and is one run with it."""
    if path and path[-1].stop == start:
        return [*path[:-1], slice(path[-1].start, stop)]
    return [*path, slice(start, stop)]


def _last(path: list[slice], count: int) -> list[slice]:
    """Return the end of a path, at most `count` tokens."""
    kept: list[slice] = []
    for run in reversed(path):
        start = max(run.start, run.stop - count)
        kept.append(slice(start, run.stop))
        count -= run.stop - start
        if not count:
            break
    return kept[::-1]


def _joined(x: torch.Tensor, runs: list[slice]) -> torch.Tensor:
    """Return these tokens of `x`, [G, T, ...], end to end."""
    return x[:, runs[0]] if len(runs) == 1 else torch.cat([x[:, run] for run in runs], dim=1)


def _add(total: torch.Tensor, runs: list[slice], part: torch.Tensor) -> None:
    """Add to these tokens of `total`, [G, T, ...], what `part` has for them, end to end."""
    first = 0
    for run in runs:
        end = first + run.stop - run.start
        total[:, run] += part[:, first:end]
        first = end


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, shared: int, window: int, softcap: float, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the softmax of a block, whose queries are the last of its keys: [G, R, K]; and the soft cap's slope."""
    scores = torch.bmm(query, key.mT)
    slope = None
    if softcap:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores**2
        scores *= softcap
    groups, rows, keys = scores.shape
    queries = rows // shared
    by_query = scores.view(groups, queries, shared, keys)
    by_query[..., keys - queries :] += _future(queries, scores.dtype, scores.device)
    if window and keys > window:
        too_old = scores.new_full((queries, keys), float("-inf")).tril(keys - queries - window)
        by_query += too_old[:, None]
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(groups, 1, shared, 1).expand(-1, queries, -1, -1).reshape(groups, rows, 1)
        return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1], slope
    return scores.softmax(-1), slope


def _future(queries: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return [queries, 1, queries]: -inf where the key comes after the query, else 0; a slice of a cached mask."""
    kept = _FUTURE.get((dtype, device))
    if kept is None or kept.shape[0] < queries:
        size = max(queries, _most_queries(device))
        kept = torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu(1)
        _FUTURE[dtype, device] = kept
    return kept[:queries, None, :queries]


_FUTURE: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
