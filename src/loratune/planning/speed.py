"""How long training and evaluation take: from what a layer of the model takes on this machine, or from published figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

EFFICIENCY = {False: 0.42, True: 0.55}
"""The share of the matmul rate that a whole step reaches, not compiled and compiled; the rest is element-wise work, attention,
and smaller products. SmolLM2-135M on two CPU cores; `docs/performance.md` has the profiles. Qwen2-1.5B reached 0.73 compiled. For
machines that are not here, and models that cannot be probed."""

COMPILED_TAKES = 0.75
"""The part of the eager time that compiled layers take: 310 against 410 tokens/s with SmolLM2-135M in bfloat16."""

START_SECONDS = 8.0
"""From the weights to the first step, for a small model: 7.7 to 9.7 s on two CPU cores, most of it the libraries."""

LOAD_BYTES_PER_SECOND = 1e9
"""At which weights are read and converted. An estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimings:
    """Seconds of a device, not compiled: measured by `probe`, or by arithmetic alone.

    Attributes:
        train: Of a token in one layer, forward and backward.
        forward: Of a token in one layer, without gradients.
        decode: Of one more token of a batch of answers in one layer.
        head_train: Of a supervised token in the output head, with its loss and gradient.
        head_forward: The same without a gradient.
        head_decode: Of one more token of a batch of answers in the output head.
    """

    train: float
    forward: float
    decode: float
    head_train: float
    head_forward: float
    head_decode: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkAmounts:
    """What a run computes.

    Attributes:
        num_layers: Of the model.
        num_recomputed: Of them, whose forward runs once more on the way back.
        tokens, supervised: Of all steps.
        held_out_tokens, held_out_supervised: Of one evaluation of the held-out loss.
        evaluations: How often that loss is measured, of the base and during training.
        prompt_tokens: Of all prompts that are answered.
        decode_steps: Tokens that the batches of answers of base and tuned grow by, one after the other.
        load_bytes: Of the weights' files.
    """

    num_layers: int
    num_recomputed: int
    tokens: float
    supervised: float
    held_out_tokens: int
    held_out_supervised: int
    evaluations: int
    prompt_tokens: int
    decode_steps: int
    load_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """Seconds, and what they were computed from.

    Attributes:
        train_seconds: Of all optimizer steps, compiling included, without evaluation.
        compile_seconds: Of them, for compiling; 0 where nothing is compiled.
        evaluate_seconds: Of held-out losses and answers, during training and after it.
        total_seconds: From the weights to the end.
        flops: Floating-point operations of all steps.
        flops_per_second: Of a matrix product on this machine, as probed, or as published.
        source: What the seconds come from, in words.
    """

    train_seconds: float
    compile_seconds: float
    evaluate_seconds: float
    total_seconds: float
    flops: float
    flops_per_second: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProbe:
    """Real steps of the run's longest batch.

    Attributes:
        num_tokens: Of the step.
        first_step_seconds: Of the first one, which compiles and warms up.
        step_seconds: Of the fastest of those after it.
        peak_bytes: Of the process.
    """

    num_tokens: int
    first_step_seconds: float
    step_seconds: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of a step after the first."""
        return self.num_tokens / self.step_seconds


def rates_by_arithmetic(
    layer_parameters: float, head_parameters: int, num_answers: int, flops_per_second: float
) -> LayerTimings:
    """Of a layer and a head of so many parameters, where they cannot be run: operations over the rate of a matrix product
    times `EFFICIENCY`. A batch's next token reads every weight for a few rows, which is slower than this."""
    rate = flops_per_second * EFFICIENCY[False]
    layer, head = layer_parameters / rate, head_parameters / rate
    return LayerTimings(
        train=4 * layer,
        forward=2 * layer,
        decode=2 * layer * num_answers,
        head_train=4 * head,
        head_forward=2 * head,
        head_decode=2 * head * num_answers,
    )


def training_flops(
    *,
    matmul_parameters: int,
    head_parameters: int,
    trainable_parameters: int,
    num_tokens: int,
    num_supervised: int,
    trained_head: int = 0,
    trained_matrices: int = 0,
) -> float:
    """Operations of training on these tokens.

    Two a weight and token forward, two for the gradient to the input; none for the gradient of frozen weights (Kaplan et
    al. 2020 count 6 for full training). The adapter takes all 6, and so do modules that are trained whole: `trained_head` and
    `trained_matrices` are their parameters. The head works on supervised tokens only. Attention's own products are left out: under
    3 % at a few hundred tokens.
    """
    body = 4.0 * matmul_parameters * num_tokens
    whole = 2.0 * trained_head * num_supervised + 2.0 * trained_matrices * num_tokens
    return body + 4.0 * head_parameters * num_supervised + 6.0 * trainable_parameters * num_tokens + whole


def plan_time(
    amounts: WorkAmounts,
    rates: LayerTimings,
    *,
    compile_seconds: float | None,
    flops: float,
    flops_per_second: float,
    source: str,
) -> TimePlan:
    """Seconds of a run.

    Args:
        amounts: What is computed.
        rates: What a layer and the head take.
        compile_seconds: What compiling takes; None where nothing is compiled.
        flops, flops_per_second, source: As in `TimePlan`.
    """
    layers = amounts.num_layers * rates.train + amounts.num_recomputed * rates.forward
    train = amounts.tokens * layers + amounts.supervised * rates.head_train
    if compile_seconds is not None:
        train = train * COMPILED_TAKES + compile_seconds
    forward = amounts.num_layers * rates.forward
    held_out = amounts.held_out_tokens * forward + amounts.held_out_supervised * rates.head_forward
    step = amounts.num_layers * rates.decode + rates.head_decode
    answers = 2 * amounts.prompt_tokens * forward + amounts.decode_steps * step
    evaluate = amounts.evaluations * held_out + answers
    return TimePlan(
        train_seconds=train,
        compile_seconds=compile_seconds or 0.0,
        evaluate_seconds=evaluate,
        total_seconds=START_SECONDS + amounts.load_bytes / LOAD_BYTES_PER_SECOND + train + evaluate,
        flops=flops,
        flops_per_second=flops_per_second,
        source=source,
    )


def with_probe(plan: TimePlan, probe: StepProbe, num_tokens: float) -> TimePlan:
    """The plan with the seconds of training that the probe's speed makes of so many tokens."""
    first = probe.first_step_seconds - probe.step_seconds
    train = num_tokens / probe.tokens_per_second + first
    return replace(
        plan,
        train_seconds=train,
        compile_seconds=first if plan.compile_seconds else 0.0,
        total_seconds=plan.total_seconds - plan.train_seconds + train,
        source="three steps of the longest batch, run here",
    )


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
        seconds += count * best_seconds(partial(torch.nn.functional.linear, inputs, weights), device)
        seconds += count * best_seconds(partial(torch.mm, upstream, weights), device)
    return flops / seconds


def best_seconds(work: Callable[[], object], device: str, *, seconds: float = 0.15) -> float:
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
    seconds = best_seconds(lambda: torch.nn.functional.linear(inputs, weights), device, seconds=0.3)
    return 2.0 * rows * width * columns / seconds
