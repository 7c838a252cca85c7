"""Kernels on this device: what machine it is, whether each is right, and which is fastest.

python measure_kernels.py machine | right | attention | chunks
"""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure_common import BIG, DEVICE, ON_GPU, attempt, difference, milliseconds, record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from loratune.model.kernels import cross_entropy
from loratune.model.kernels.attention import observe_attention, packed_attention, register
from loratune.model.kernels.block_attention import block_attention
from loratune.model.kernels.cross_entropy import Head, sum_cross_entropy
from loratune.model.kernels.dropout import AdapterDropout, column_numbers, keep_mask, row_numbers, rows_of_forward
from loratune.model.kernels.fp8_linear import Fp8Linear
from loratune.model.kernels.lora_linear import lora_linear

PACKAGES = [
    "loratune",
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "liger_kernel",
    "flash_attn",
]
BF16 = torch.bfloat16
ROUNDING = 0.02
"""Largest relative error, in norm, that rounding to bfloat16 explains in these sums."""


def normal(*shape: int, dtype: torch.dtype = BF16, factor: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * factor).to(dtype)


def machine() -> None:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_properties(0) if ON_GPU else None
    record(
        machine=device.name if device else "CPU",
        memory_gib=device.total_memory / 2**30 if device else None,
        capability=torch.cuda.get_device_capability() if device else None,
        python=sys.version.split()[0],
        versions=versions,
        cudnn=torch.backends.cudnn.version(),
        varlen_arguments=list(inspect.signature(varlen_attn).parameters),
    )
    size = 8192 if ON_GPU else 256
    a, b = normal(size, size), normal(size, size)
    flops = 2 * size**3 / milliseconds(lambda: a @ b) * 1e3
    source = torch.zeros(2**30 if ON_GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3
    one = torch.zeros(1, device=DEVICE)
    record(
        rates=True,
        matmul_flops_per_second=flops,
        copied_bytes_per_second=copied,
        launch_seconds=milliseconds(lambda: one.add_(1), runs=200) / 1e3,
    )


# ---- right


def _attention_case(heads: int, groups: int, width: int, **form: Any) -> None:
    lengths = (1, 130, 77, 300)
    ends = torch.tensor([0, 1, 131, 208, 508], dtype=torch.int32)
    whole = {"cu_seq_lens_q": ends.to(DEVICE), "cu_seq_lens_k": ends, "max_length_q": max(lengths)}
    inputs = [normal(1, n, sum(lengths), width).requires_grad_() for n in (heads, groups, groups)]
    upstream = normal(1, sum(lengths), heads, width)
    with observe_attention() as observed:
        out, _ = packed_attention(torch.nn.Module(), *inputs, None, **whole, **form)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    wanted = block_attention(
        *exact, ends, scale=width**-0.5, window=form.get("sliding_window"), softcap=form.get("softcap")
    )
    found = (out, *torch.autograd.grad(out, inputs, upstream))
    expected = (wanted, *torch.autograd.grad(wanted, exact, upstream.double().cpu()))
    errors = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    kernel = "blocks" if observed.slow_because or not ON_GPU else "varlen"
    record(
        what=f"attention {heads}:{groups} of {width} {form or ''}".strip(),
        ok=max(errors) < ROUNDING,
        kernel=kernel,
        errors=errors,
    )


def _check(
    what: str,
    kernel: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: list[torch.Tensor],
    tolerance: float = ROUNDING,
) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    out, wanted = kernel(*leaves), definition(*exact)
    upstream = torch.randn(wanted.shape, dtype=torch.float64)
    found = (out, *torch.autograd.grad(out, leaves, upstream.to(out)))
    expected = (wanted, *torch.autograd.grad(wanted, exact, upstream))
    errors = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    record(what=what, ok=max(errors) < tolerance, errors=errors)


def _lora(
    layer: Callable[..., Any],
    weight: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    out: torch.Tensor = layer(x, weight, bias, a, b, 2.0)
    return out


def _dropout_case(compiled: bool) -> None:
    """The mean of what dropout keeps, from ones through an adapter of ones."""
    x, a, b = normal(4096, 256) * 0 + 1, torch.ones(8, 256, device=DEVICE), torch.ones(16, 8, device=DEVICE)
    drop = AdapterDropout(0.05, "q_proj", 256, x.device)
    function = torch.compile(lora_linear, dynamic=True) if compiled else lora_linear
    out = function(x, torch.zeros(16, 256, device=DEVICE, dtype=BF16), None, a, b, 1.0, drop)
    mean = float(out.double().mean()) / (256 * 8)
    record(what=f"mean of dropout, {'compiled' if compiled else 'eager'}", ok=abs(mean - 1) < 0.01, errors=[mean - 1])


def _mask_case() -> None:
    """The mask of dropout, on this device eager and compiled, against the one that eager code computes on a CPU."""
    rows, columns = row_numbers(7, 3, [5, 900], [700, 333]), column_numbers("layers.0.q_proj", 384)
    with rows_of_forward(rows):
        expected = keep_mask(torch.empty(1033, 384), columns, 0.05)
    own = rows.to(DEVICE), columns.to(DEVICE)
    for how, mask in (("eager", keep_mask), ("compiled", torch.compile(keep_mask, dynamic=True))):
        with rows_of_forward(own[0]):
            found = mask(torch.empty(1033, 384, device=DEVICE), own[1], 0.05).cpu()
        differing = int((found != expected).sum())
        record(what=f"dropout's mask, {how} = a CPU's bits", ok=not differing, errors=[differing])


def right() -> None:
    torch.manual_seed(1)
    register()
    for heads, groups, width in ((12, 2, 128), (9, 3, 64), (4, 4, 8), (4, 2, 256)):
        for form in ({}, {"sliding_window": 37}):
            attempt("attention", partial(_attention_case, heads, groups, width, **form))
    attempt("attention", partial(_attention_case, 4, 2, 64, softcap=20.0))
    attempt("dropout's mask", _mask_case)
    vocabulary, rows = (50_000, 3000) if ON_GPU else (500, 60)
    head, targets = normal(vocabulary, 256, factor=0.05), torch.randint(vocabulary, (rows,))
    weight, bias = normal(512, 256, factor=0.06), normal(512)
    layer = torch.nn.Linear(256, 512, bias=False, device=DEVICE, dtype=BF16).requires_grad_(False)
    adapter = [normal(16, 256, dtype=torch.float32, factor=0.1), normal(512, 16, dtype=torch.float32, factor=0.1)]
    for compiled in (False, True):
        how, wrap = ("compiled", partial(torch.compile, dynamic=True)) if compiled else ("eager", lambda work: work)
        cases: list[tuple[Any, ...]] = [
            (
                f"cross-entropy, {how}",
                lambda h, c=compiled: sum_cross_entropy(h, Head(head), targets.to(DEVICE), compiled=c),
                lambda h: F.cross_entropy(h @ head.double().cpu().T, targets, reduction="sum"),
                [normal(rows, 256)],
            ),
            (
                f"LoRA layer, {how}",
                partial(_lora, wrap(lora_linear), weight, bias),
                lambda x, a, b: F.linear(x, weight.double().cpu(), bias.double().cpu()) + 2 * x @ a.T @ b.T,
                [normal(700, 256), *adapter],
            ),
            (
                f"fp8 layer, {how}",
                wrap(Fp8Linear(layer)),
                lambda x: F.linear(x, layer.weight.double().cpu()),
                [normal(704, 256)],
                0.06,  # e4m3 has three bits of mantissa
            ),
        ]
        for case in cases:
            attempt(case[0], partial(_check, *case))
        attempt("dropout", partial(_dropout_case, compiled))


# ---- fast


def attention() -> None:
    """Which attention of packed examples is fastest, forward and backward; 12 query heads share 2 of 128."""
    total, heads, groups, width = (16_384, 12, 2, 128) if ON_GPU else (128, 4, 2, 16)
    for length in (1024, 4096, 16_384) if ON_GPU else (64,):
        ends = torch.arange(0, total + 1, length, dtype=torch.int32)
        query, key, value = (normal(total, n, width).requires_grad_() for n in (heads, groups, groups))
        upstream, flops = normal(total, heads, width), 3.5 * 2 * total * length * heads * width

        def packed(q: torch.Tensor = query, k: torch.Tensor = key, v: torch.Tensor = value, e: Any = ends) -> Any:
            whole = {"cu_seq_lens_q": e.to(DEVICE), "cu_seq_lens_k": e, "max_length_q": int(e[1])}
            tensors = [x.transpose(0, 1)[None] for x in (q, k, v)]
            return packed_attention(torch.nn.Module(), *tensors, None, **whole)[0][0]

        def dense(
            backend: Any, q: torch.Tensor = query, k: torch.Tensor = key, v: torch.Tensor = value, n: int = length
        ) -> Any:
            rows = [x.view(-1, n, x.shape[1], width).transpose(1, 2) for x in (q, k, v)]
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape_as(q)

        ways: dict[str, Callable[[], Any]] = {"packed": packed}
        kinds = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if ON_GPU else ("MATH",)
        ways |= {kind: partial(dense, getattr(SDPBackend, kind)) for kind in kinds}
        for name, way in ways.items():

            def measure(n: str = name, w: Any = way, x: Any = (query, key, value), g: Any = upstream) -> None:
                spent = milliseconds(lambda: torch.autograd.grad(w(), x, g))
                record(attention=n, length=length, milliseconds=spent, flops_per_second=flops / spent * 1e3)  # noqa: B023

            attempt(f"{name} at {length}", measure)


def chunks() -> None:
    """How many rows of logits to compute at a time."""
    rows, hidden, vocabulary = 8192 if ON_GPU else 64, BIG["hidden_size"], BIG["vocab_size"]
    head, targets = Head(normal(vocabulary, hidden, factor=0.02)), torch.randint(vocabulary, (rows,), device=DEVICE)
    states = normal(rows, hidden).requires_grad_()
    for size in (896, 1408, 1664, 2816, 5632) if ON_GPU else (16, 32):
        for compiled in (False, True):

            def measure(size: int = size, compiled: bool = compiled) -> None:
                cross_entropy.CHUNK_BYTES[DEVICE] = 4 * vocabulary * size
                spent = milliseconds(lambda: sum_cross_entropy(states, head, targets, compiled=compiled), runs=5)
                flops = 4 * rows * hidden * vocabulary / spent * 1e3
                record(chunk_rows=size, compiled=compiled, milliseconds=spent, flops_per_second=flops)

            attempt(f"chunks of {size}", measure)


if __name__ == "__main__":
    {"machine": machine, "right": right, "attention": attention, "chunks": chunks}[sys.argv[1]]()
