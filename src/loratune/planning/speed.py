"""How long training and evaluation take: the seconds of a layer, times the amounts of work.

    LayerTimings   seconds of a token in a layer and in the head: timed by `probe`, or by arithmetic on a matmul rate
    WorkAmounts    tokens of a run, from `cost`
    plan_time      both together → TimePlan

Called by `estimate`. Knows no model and no recipe; times matrix products, and nothing larger.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EAGER_EFFICIENCY = 0.42
"""The fraction of the matmul rate that an uncompiled step reaches; the rest is element-wise work, attention and smaller
products. SmolLM2-135M on two CPU cores (compiled: 0.55; Qwen2-1.5B compiled: 0.73); `docs/performance.md` has the
profiles. Used for machines that are not here, and for models whose layers cannot be timed."""

COMPILED_TIME_FRACTION = 0.75
"""Compiled layers' part of the eager time: 310 tokens/s eager, 410 compiled, with SmolLM2-135M in bfloat16."""

START_SECONDS = 8.0
"""Seconds from the weights to the first step, for a small model: 7.7 to 9.7 on two CPU cores, mostly imports."""

TIMED_SECONDS, FEWEST_REPETITIONS = 0.15, 3
"""How long, and at least how often, each operation is repeated to time it; the best repetition counts."""

LOAD_BYTES_PER_SECOND = 1e9
"""Rate at which weights are read and converted. An estimate."""


LAUNCHES = {"train": 144, "decode": 63}
"""Operations of one layer that a GPU launches, uncompiled: forward and backward with an adapter on query and value and
dropout, and one more token. Counted on the meta device for a layer of Qwen2, without views and allocations; 26 and 13
of them are matrix products."""

PASSES = {"train": 16.5, "forward": 6.8}
"""How often uncompiled element-wise work reads or writes each output of a layer's matrices, forward and backward, and
forward alone. An estimate, never measured: three times the 5.5 and 2.3 that were counted in the CUDA code of compiled
layers (`tests/training/test_cuda_code.py`), where norms, rotary positions, activations and dropout are fused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """What a GPU reaches, measured there or taken from published figures (`hardware.measured`).

    Attributes:
        products: Floating-point operations per second of matrix products.
        copies: Bytes per second of element-wise work.
        launch_seconds: Seconds of the host for one operation in eager mode.
    """

    products: float
    copies: float
    launch_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimings:
    """Seconds of one layer and of the output head, not compiled: timed by `probe`, or by arithmetic alone.

    Attributes:
        train: Seconds of a token in one layer, forward and backward.
        forward: Seconds of a token in one layer, without gradients.
        decode: Seconds in one layer of one more token for a batch of answers.
        head_train: Seconds of a supervised token in the output head, with its loss and gradient.
        head_forward: The same without a gradient.
        head_decode: Seconds in the output head of one more token for a batch of answers.
        launch: Seconds that the host needs for one layer of one micro-batch, forward and backward, however few tokens
            it has; 0 where the timings include them.
    """

    train: float
    forward: float
    decode: float
    head_train: float
    head_forward: float
    head_decode: float
    launch: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkAmounts:
    """What a run computes.

    Attributes:
        num_layers: Layers of the model.
        num_recomputed: How many of them run forward again during the backward pass.
        tokens: Tokens of all steps.
        supervised: Supervised tokens of all steps.
        micro_batches: Micro-batches of all steps.
        held_out_tokens: Tokens of one evaluation of the held-out loss.
        held_out_supervised: Supervised tokens of one evaluation of the held-out loss.
        evaluations: How often the held-out loss is measured: for the base, and for the fine-tuned model.
        reference_tokens: Tokens of the pass before step 1 that preferences are compared with.
        reference_supervised: Supervised tokens of that pass.
        prompt_tokens: Tokens of all prompts to be answered.
        decode_steps: Tokens that all batches of answers grow by, one after the other, base and fine-tuned together.
        load_bytes: Bytes of the weights' files.
    """

    num_layers: int
    num_recomputed: int
    tokens: float
    supervised: float
    micro_batches: float
    held_out_tokens: int
    held_out_supervised: int
    evaluations: int
    prompt_tokens: int
    decode_steps: int
    load_bytes: int
    reference_tokens: float = 0.0
    reference_supervised: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """Seconds, and what they were computed from.

    Attributes:
        train_seconds: Seconds of all optimizer steps, compilation included, without evaluation.
        compile_seconds: How many of these are for compilation; 0 if nothing is compiled.
        evaluate_seconds: Seconds of held-out losses and answers, during training and after it.
        total_seconds: Seconds from loading the weights to the end.
        flops: Floating-point operations of all steps.
        flops_per_second: Rate of a matrix product, measured on this machine or published.
        source: What the seconds come from, for people.
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
    """Measurements of real steps on the run's longest batch.

    Attributes:
        num_tokens: Tokens of the step.
        first_step_seconds: Seconds of the first step, which compiles and warms up.
        step_seconds: Seconds of the fastest step after it.
        peak_bytes: Peak memory of the process.
    """

    num_tokens: int
    first_step_seconds: float
    step_seconds: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of a step after the first."""
        return self.num_tokens / self.step_seconds


def rates_by_arithmetic(
    layer_parameters: float,
    head_parameters: int,
    num_answers: int,
    flops_per_second: float,
    *,
    gpu: GpuRates | None = None,
    weight_bytes: int = 2,
    layer_outputs: int = 0,
) -> LayerTimings:
    """Return the timings of a layer and a head that cannot be run: operations over a fraction of the matmul rate.

    On a GPU, element-wise work takes the time of its traffic. Decoding is bound by reading every weight for a few rows,
    or by the host; and so is training on few tokens by the host. Elsewhere all this is in one fraction, and decoding is
    planned too fast.

    Args:
        layer_parameters: Frozen parameters of a layer.
        head_parameters: Parameters of the output head.
        num_answers: Answers of a batch.
        flops_per_second: Rate of a matrix product.
        gpu: What a GPU reaches; None: not a GPU.
        weight_bytes: Bytes of a frozen weight.
        layer_outputs: Outputs of all matrices of a layer for one token; 0: unknown.
    """
    rate = flops_per_second * EAGER_EFFICIENCY
    layer, head = layer_parameters / rate, head_parameters / rate
    train, forward = 4 * layer, 2 * layer
    if gpu is not None and layer_outputs:
        traffic = layer_outputs * weight_bytes / gpu.copies
        train = 4 * layer_parameters / gpu.products + PASSES["train"] * traffic
        forward = 2 * layer_parameters / gpu.products + PASSES["forward"] * traffic
    read = weight_bytes / gpu.copies if gpu is not None else 0.0
    launch = gpu.launch_seconds if gpu is not None else 0.0
    return LayerTimings(
        train=train,
        forward=forward,
        decode=max(2 * layer * num_answers, layer_parameters * read, LAUNCHES["decode"] * launch),
        head_train=4 * head,
        head_forward=2 * head,
        head_decode=max(2 * head * num_answers, head_parameters * read),
        launch=LAUNCHES["train"] * launch,
    )


def training_flops(
    *,
    matmul_parameters: int,
    head_parameters: int,
    trainable_parameters: int,
    num_tokens: float,
    num_supervised: int,
    trained_head: int = 0,
    trained_matrices: int = 0,
) -> float:
    """Return the floating-point operations of training on these tokens.

    A frozen weight takes two a token forward and two for the gradient to the input, and none for its own gradient
    (Kaplan et al. 2020, arXiv 2001.08361, count 6 for full training). The adapter takes all 6. Attention's own products
    are left out: under 3 % at a few hundred tokens.

    Args:
        matmul_parameters: Frozen parameters of the layers.
        head_parameters: Parameters of the output head, which computes on supervised tokens only.
        trainable_parameters: Parameters of the adapter.
        num_tokens: Tokens of the steps.
        num_supervised: Supervised tokens of the steps.
        trained_head: Parameters of the head if it is trained in full, else 0.
        trained_matrices: Parameters of other modules trained in full.
    """
    layers = 4.0 * matmul_parameters * num_tokens
    # Of the 6 of a module trained in full, 4 are counted with the frozen parameters, which include it.
    own_gradients = 2.0 * trained_head * num_supervised + 2.0 * trained_matrices * num_tokens
    head, adapter = 4.0 * head_parameters * num_supervised, 6.0 * trainable_parameters * num_tokens
    return layers + head + adapter + own_gradients


def plan_time(
    amounts: WorkAmounts,
    rates: LayerTimings,
    *,
    compile_seconds: float | None,
    flops: float,
    flops_per_second: float,
    source: str,
) -> TimePlan:
    """Return the seconds of a run.

    Args:
        amounts: What is computed.
        rates: Seconds of a layer and of the head.
        compile_seconds: Seconds of compilation; None if nothing is compiled.
        flops: Floating-point operations of all steps.
        flops_per_second: Rate of a matrix product.
        source: What the seconds come from, for people.
    """
    layers = amounts.num_layers * rates.train + amounts.num_recomputed * rates.forward
    train = amounts.tokens * layers + amounts.supervised * rates.head_train
    train = max(train, amounts.micro_batches * amounts.num_layers * rates.launch)
    if compile_seconds is not None:
        train = train * COMPILED_TIME_FRACTION + compile_seconds
    forward = amounts.num_layers * rates.forward
    held_out = amounts.held_out_tokens * forward + amounts.held_out_supervised * rates.head_forward
    step = amounts.num_layers * rates.decode + rates.head_decode
    answers = 2 * amounts.prompt_tokens * forward + amounts.decode_steps * step
    reference = amounts.reference_tokens * forward + amounts.reference_supervised * rates.head_forward
    evaluate = amounts.evaluations * held_out + answers + reference
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
    """Return the plan with the seconds of training at the probe's speed.

    Args:
        plan: The plan before real steps were run.
        probe: What real steps took.
        num_tokens: Tokens of all steps.
    """
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
    """Measure the floating-point operations per second of a model's products, forward and backward to the input.

    Args:
        shapes: (inputs, outputs) of a matrix → how many of that shape the model has.
        device: cpu, cuda or mps.
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


def best_seconds(work: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest of the repetitions in `TIMED_SECONDS`, of at least `FEWEST_REPETITIONS`."""
    best, deadline, runs = float("inf"), time.perf_counter() + TIMED_SECONDS, 0
    repeats = 10 if device == "cuda" else 1  # waiting for a GPU takes longer than many a product
    while runs < FEWEST_REPETITIONS or time.perf_counter() < deadline:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        best, runs = min(best, (time.perf_counter() - start) / repeats), runs + 1
    return best


def matmul_rate(*, device: str, dtype: torch.dtype, width: int) -> float:
    """Measure the floating-point operations per second of a [1024, width] × [width, 3·width] product.

    The best of several: what the machine can do, not what other processes leave of it. Widths under 512 are too short
    to time.
    """
    rows, width = 1024, max(width, 512)
    columns = 3 * width
    inputs = torch.randn(rows, width, dtype=dtype, device=device)
    weights = torch.randn(columns, width, dtype=dtype, device=device)
    seconds = best_seconds(lambda: torch.nn.functional.linear(inputs, weights), device)
    return 2.0 * rows * width * columns / seconds
