"""Which device, and which type for the frozen weights, with the reason for each choice."""

from __future__ import annotations

import ctypes
import gc
import getpass
import os
import resource
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from loratune.run.errors import MachineError

_ALLOCATORS = ("can't allocate memory", "not enough memory", "out of memory")
"""What the CPU's allocator and MPS say in a plain RuntimeError."""

FP8_CAPABILITY = (9, 0)
"""CUDA's compute capability from which on scaled products have a scale for each row."""

FASTER = 1.2
"""bfloat16 must multiply at least this much faster than float32 to be chosen on a CPU: it halves memory, but rounds."""

COMPILE_SECONDS = 60
"""What compiling takes on two CPU cores with nothing in the cache."""

CACHED_COMPILE_SECONDS = 15
"""The same with everything in the cache: 10 to 20 s."""

COMPILE_SAVES = 0.25
"""The part of the training time that compiled layers save: 310 against 410 tokens/s with SmolLM2-135M in bfloat16."""

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

    On a CPU the two are timed, because what the processor's flags promise is not what it does: AVX512-BF16 was 2.6
    times as fast as float32 on a Zen 4 and 0.4 times on a Xeon without AMX.
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


def check_fp8(device: str) -> None:
    """Whether this machine multiplies fp8 with a scale for each row.

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
    """What to say where there is no fp8."""
    return MachineError(
        "model.quantization is fp8, which needs an NVIDIA GPU of Hopper's generation (SM 9.0) or later; this is "
        f"{here}",
        fix="model.quantization=none",
    )


def choose_compile(wanted: str | bool, *, device: str, train_seconds: float) -> Choice:
    """`true` or `false`: whether to compile, given the seconds that training takes without.

    Raises:
        MachineError: Compilation was asked for and has no compiler.
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
    """What compiling is going to take: less where torch has compiled before."""
    default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default)
    return CACHED_COMPILE_SECONDS if folder.is_dir() and any(folder.iterdir()) else COMPILE_SECONDS


def cpp_compiler() -> str | None:
    """The C++ compiler that compilation for a CPU needs at run time, or None."""
    return next(filter(None, (shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))), None)


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


def peak_bytes(device: str) -> int:
    """The most memory that this process has had on the device."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage: there a process starts with the peak of the one that started it
        (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)


def free_memory() -> None:
    """Give back what nobody holds, on a CPU also the free pages of glibc's heap: half of the process after a
    training."""
    gc.collect()
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
