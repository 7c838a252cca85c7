"""The device, the type of the frozen weights, and compilation: what `auto` becomes, and why."""

from __future__ import annotations

import ctypes
import gc
import getpass
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from loratune.run.errors import MachineError, plural

_ALLOCATORS = ("can't allocate memory", "not enough memory", "out of memory")
"""Phrases of the CPU's allocator and of MPS, which raise a plain RuntimeError."""

FP8_CAPABILITY = (9, 0)
"""The lowest CUDA compute capability with scaled matrix products that take a scale per row."""

FASTER = 1.2
"""How many times faster than float32 bfloat16 must multiply to be chosen on a CPU: it halves memory, but rounds."""

COMPILE_SECONDS = 60
"""Seconds that compiling takes on two CPU cores with an empty cache."""

CACHED_COMPILE_SECONDS = 15
"""Seconds that compiling takes with a full cache: 10 to 20 s were measured."""

COMPILE_SAVES = 0.25
"""Fraction of the training time that compiled layers save: 410 vs. 310 tokens/s with SmolLM2-135M in bfloat16."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` became.

    Attributes:
        value: The chosen setting.
        reason: The reason in words for the user; empty if the user chose.
    """

    value: str
    reason: str = ""


def choose_device(wanted: str) -> Choice:
    """Choose `cuda`, `mps` or `cpu`.

    Raises:
        MachineError: The recipe names a device that this machine does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto":
        if not available[wanted]:
            has = ", ".join(name for name, there in available.items() if there)
            raise MachineError(f"device {wanted} is not available; this machine has {has}", fix="train.device=auto")
        return Choice(wanted)
    if available["cuda"]:
        return Choice("cuda", torch.cuda.get_device_name())
    if available["mps"]:
        return Choice("mps", "Apple GPU, no CUDA")
    return Choice("cpu", f"no GPU, {plural(torch.get_num_threads(), 'thread')}")


def device_here(wanted: str) -> str:
    """Return the wanted device, or the best one if this machine lacks it, as for a run trained elsewhere."""
    try:
        return choose_device(wanted).value
    except MachineError:
        return choose_device("auto").value


def choose_dtype(wanted: str, device: str) -> Choice:
    """Choose `float32`, `bfloat16` or `float16` for the frozen base weights."""
    if wanted != "auto":
        return Choice(wanted)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return Choice("bfloat16", f"CUDA SM {major}.{minor}")
        return Choice("float32", f"CUDA SM {major}.{minor} has no bfloat16")
    if device == "mps":
        return Choice("float32", "bfloat16 is incomplete on MPS")
    # Timed, since the processor's flags do not tell: with AVX512-BF16, bfloat16 was 2.6 × as fast as float32 on a Zen 4
    # and 0.4 × on a Xeon without AMX.
    ratio = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
    reason = f"this CPU multiplies bfloat16 {ratio:.1f} × as fast as float32"
    return Choice("bfloat16" if ratio >= FASTER else "float32", reason)


def check_fp8(device: str) -> None:
    """Check that this machine multiplies fp8 matrices with a scale per row.

    Raises:
        MachineError: It does not.
    """
    here = f"the {device}"
    if device == "cuda":
        if torch.cuda.get_device_capability() >= FP8_CAPABILITY:
            return
        major, minor = torch.cuda.get_device_capability()
        here = f"{torch.cuda.get_device_name()} (SM {major}.{minor})"
    raise no_fp8(here)


def no_fp8(here: str) -> MachineError:
    """Return the error for a device without fp8; `here` is its description."""
    return MachineError(
        f"model.quantization is fp8, which needs an NVIDIA GPU, Hopper (SM 9.0) or later; this is {here}",
        fix="model.quantization=none",
    )


def choose_compile(wanted: str | bool, *, device: str, train_seconds: float) -> Choice:
    """Choose `true` or `false` for compilation.

    Args:
        wanted: The recipe's `train.compile`.
        device: cpu, cuda or mps.
        train_seconds: Estimated seconds of training without compilation.

    Raises:
        MachineError: The recipe wants compilation, and there is no compiler.
    """
    missing = device == "cpu" and cpp_compiler() is None
    if wanted is True and missing:
        raise MachineError(
            "train.compile is true, but there is no C++ compiler", fix="install g++, or train.compile=auto"
        )
    if wanted != "auto":
        return Choice(str(wanted).lower())
    if device == "mps":
        return Choice("false", "not on MPS")
    if missing:
        return Choice("false", "no C++ compiler; install g++ for about a third more speed")
    if train_seconds * COMPILE_SAVES < COMPILE_SECONDS:
        return Choice("false", f"the run is too short to repay the {COMPILE_SECONDS} s that compiling can take")
    return Choice("true", f"saves about {train_seconds * COMPILE_SAVES - COMPILE_SECONDS:,.0f} s")


def compile_seconds() -> int:
    """Estimate the seconds that compiling takes: fewer if torch's cache is not empty."""
    default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default)
    return CACHED_COMPILE_SECONDS if folder.is_dir() and any(folder.iterdir()) else COMPILE_SECONDS


def cpp_compiler() -> str | None:
    """Return the C++ compiler that torch needs to compile for a CPU; None if there is none."""
    return next(filter(None, (shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))), None)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type with this name."""
    return _DTYPES[name]


@cache  # one answer for a process, however many runs it plans
def _matmul_seconds(dtype: torch.dtype) -> float:
    """Time the product of a small model's feed-forward layer; return the best of several, in seconds."""
    inputs, weights = torch.randn(256, 768, dtype=dtype), torch.randn(2048, 768, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(inputs, weights)
        best = min(best, time.perf_counter() - start)
    return best


def peak_bytes(device: str) -> int:
    """Return the largest number of bytes that this process has held on the device."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage, where a process inherits the peak of its parent
        (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)


def free_memory() -> None:
    """Return unused memory to the system and the GPU."""
    gc.collect()
    with suppress(AttributeError, TypeError):  # a C library other than glibc; Windows
        # Free pages of the heap: half of the process's memory after a training on a CPU.
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
