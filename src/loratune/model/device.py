"""Which device, and which type for the frozen weights, with the reason for each choice."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from loratune.errors import MachineError

FASTER = 1.2
"""bfloat16 must multiply at least this much faster than float32 to be chosen on a CPU: it halves memory, but rounds."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` became.

    Attributes:
        value: The chosen setting.
        reason: Why, in words for the user; empty when the user chose.
    """

    value: str
    reason: str = ""


def choose_device(wanted: str) -> Choice:
    """`cuda`, `mps` or `cpu`.

    Raises:
        MachineError: The device that was asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto":
        if not available[wanted]:
            has = ", ".join(name for name, there in available.items() if there)
            raise MachineError(f"device {wanted} is not available, this machine has {has}", fix="train.device=auto")
        return Choice(wanted)
    if available["cuda"]:
        return Choice("cuda", torch.cuda.get_device_name())
    if available["mps"]:
        return Choice("mps", "Apple GPU, no CUDA")
    return Choice("cpu", f"no GPU, {torch.get_num_threads()} threads")


def device_here(wanted: str) -> str:
    """The wanted device, or the best one where that is not on this machine: of a run that was trained elsewhere."""
    try:
        return choose_device(wanted).value
    except MachineError:
        return choose_device("auto").value


def choose_dtype(wanted: str, device: str) -> Choice:
    """`float32`, `bfloat16` or `float16` for the frozen base weights.

    On a CPU the two are timed, because what the processor's flags promise is not what it does: AVX512-BF16 was 2.6 times
    as fast as float32 on a Zen 4 and 0.4 times on a Xeon without AMX.
    """
    if wanted != "auto":
        return Choice(wanted)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return Choice("bfloat16", f"CUDA SM {major}.{minor}")
        return Choice("float32", f"CUDA SM {major}.{minor} has no bfloat16")
    if device == "mps":
        return Choice("float32", "bfloat16 is incomplete on MPS")
    ratio = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
    reason = f"this CPU multiplies bfloat16 {ratio:.1f} × as fast as float32"
    return Choice("bfloat16" if ratio >= FASTER else "float32", reason)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a name."""
    return _DTYPES[name]


def _matmul_seconds(dtype: torch.dtype) -> float:
    """The best of several products at the size of a small model's feed-forward layer, in seconds."""
    inputs, weights = torch.randn(1024, 768, dtype=dtype), torch.randn(2048, 768, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(inputs, weights)
        best = min(best, time.perf_counter() - start)
    return best
