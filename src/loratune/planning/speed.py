"""How long training takes: the arithmetic of the run over the rate at which this machine does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

EFFICIENCY = {False: 0.42, True: 0.55}
"""The share of the matmul rate that a whole step reaches, not compiled and compiled; the rest is element-wise work, attention,
and smaller products. SmolLM2-135M on two CPU cores; `docs/performance.md` has the profiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """Attributes:
    train_seconds: Of all optimizer steps, without evaluation.
    flops: Floating-point operations of all steps.
    flops_per_second: Of a matrix product on this machine, as probed.
    """

    train_seconds: float
    flops: float
    flops_per_second: float


def training_flops(
    *, matmul_parameters: int, head_parameters: int, trainable_parameters: int, num_tokens: int, num_supervised: int
) -> float:
    """Operations of training on these tokens.

    Two a weight and token forward, two for the gradient to the input; none for the gradient of frozen weights (Kaplan et
    al. 2020 count 6 for full training). The adapter takes all 6. The head works on supervised tokens only. Attention's own
    products are left out: under 3 % at a few hundred tokens.
    """
    body = 4.0 * matmul_parameters * num_tokens
    return body + 4.0 * head_parameters * num_supervised + 6.0 * trainable_parameters * num_tokens


def plan_time(flops: float, flops_per_second: float, *, compiled: bool) -> TimePlan:
    """Seconds for so many operations on a machine whose matrix products run at this rate."""
    seconds = flops / (flops_per_second * EFFICIENCY[compiled])
    return TimePlan(train_seconds=seconds, flops=flops, flops_per_second=flops_per_second)


def matmul_rate_of(shapes: Mapping[tuple[int, int], int], *, device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a model's products, forward and for the gradient to the input.

    Args:
        shapes: (inputs, outputs) of a matrix → how many there are.
        device: Where.
        dtype: Type of both factors.
    """
    rows, flops, seconds = 1536, 0.0, 0.0
    for (width, columns), count in shapes.items():
        inputs = torch.randn(rows, width, dtype=dtype, device=device)
        weights = torch.randn(columns, width, dtype=dtype, device=device)
        upstream = torch.randn(rows, columns, dtype=dtype, device=device)
        flops += count * 4.0 * rows * width * columns
        seconds += count * _best(partial(torch.nn.functional.linear, inputs, weights), device)
        seconds += count * _best(partial(torch.mm, upstream, weights), device)
    return flops / seconds


def _best(work: Callable[[], object], device: str, *, seconds: float = 0.15) -> float:
    """Seconds of the fastest of the repetitions that fit in `seconds`, at least three."""
    best, deadline, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def matmul_rate(*, device: str, dtype: torch.dtype, width: int) -> float:
    """Floating-point operations per second of a [1024, width] × [width, 3·width] product, the best of several:
    what the machine can do, not what others leave of it. Widths under 512 are too short to time."""
    rows, width = 1024, max(width, 512)
    columns = 3 * width
    inputs = torch.randn(rows, width, dtype=dtype, device=device)
    weights = torch.randn(columns, width, dtype=dtype, device=device)
    seconds = _best(lambda: torch.nn.functional.linear(inputs, weights), device, seconds=0.3)
    return 2.0 * rows * width * columns / seconds
