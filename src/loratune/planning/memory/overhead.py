"""What a process needs in addition to tensors: Python and the libraries, a GPU's context, fragmentation of the
allocator."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratune.planning.memory.inputs import ExecutionSetup

CONTEXT_BYTES = {"cuda": 600 * 2**20, "mps": 600 * 2**20}
"""Memory of a GPU before any weight is loaded: its context and the libraries' code. Estimates."""

TRAINER_BYTES = 72 * 2**20
"""What the trainer's libraries add to a process that has made a plan: 411 → 483 MiB resident."""

RUNNING_BYTES = 40 * 2**20
"""What torch's own code and caches add once it runs: 520 → 556 MiB resident after loading SmolLM2-135M."""

COMPILER_BYTES = 105 * 2**20
"""What the compiler leaves in the process: 384 → 482 MiB besides tensors after the first step, eager and compiled."""

HEAP_OVERHEAD_FRACTION = {"narrow": 0.3, "float32": 0.15, "compiled": 0.05}
"""What the fragmentation of glibc's heap adds to the activations on a CPU, by how the layers run. Tensors of many sizes
come and go in it, those of 2 MiB and more are aligned to that for large pages, and it does not shrink. Eager steps in
16 bits mix most sizes, since norms compute in float32."""

HEAP_BYTES = 100 * 2**20
"""What that fragmentation adds to eager 16-bit steps, whatever their size."""

SIZES_BYTES = 270 * 2**20
"""What steps of ever new sizes add besides: gaps left by tensors of other sizes, and oneDNN's caches of prepared
products. The quickstart grew by that until its 28th step, in either type, eager and compiled."""

FULL_SIZES = 28
"""The number of different step sizes at which `SIZES_BYTES` is reached."""

GPU_OVERHEAD_FRACTION = 0.05
"""What the fragmentation of a GPU's caching allocator adds to the activations. An estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What a process takes besides tensors.

    Attributes:
        present_bytes: What is already resident.
        expected_bytes: What the process will add, fragmentation not counted.
        fragmentation_bytes: What the allocator adds, however large the activations are.
        fragmentation_fraction: What it adds to each byte of activations.
    """

    present_bytes: int
    expected_bytes: int
    fragmentation_bytes: int
    fragmentation_fraction: float


def overhead_of(place: ExecutionSetup, dtype_bytes: int, num_sizes: int) -> Overhead:
    """Return what the process needs in addition to tensors.

    Args:
        place: The device, and the memory of this process now.
        dtype_bytes: Bytes of one frozen weight.
        num_sizes: How many different numbers of tokens the steps have.
    """
    present, expected = _process_bytes(place)
    fraction, holes = _fragmentation(place, dtype_bytes, num_sizes)
    return Overhead(
        present_bytes=present,
        expected_bytes=expected,
        fragmentation_bytes=holes,
        fragmentation_fraction=fraction,
    )


def _process_bytes(place: ExecutionSetup) -> tuple[int, int]:
    """Return the bytes that are resident now, and those still to come.

    On a CPU the first is measured: libraries and data are there when the plan is made.
    """
    if place.device != "cpu":
        return 0, CONTEXT_BYTES[place.device]
    expected = RUNNING_BYTES + (COMPILER_BYTES if place.compiled else 0)
    if "trl" not in sys.modules:
        expected += TRAINER_BYTES
    return place.resident_bytes, expected


def _fragmentation(place: ExecutionSetup, dtype_bytes: int, num_sizes: int) -> tuple[float, int]:
    """Return the bytes that the allocator adds to each byte of activations, and those that it adds anyway."""
    if place.device != "cpu":
        return GPU_OVERHEAD_FRACTION, 0
    sizes = SIZES_BYTES * min(num_sizes, FULL_SIZES) // FULL_SIZES
    kind = "compiled" if place.compiled else "float32" if dtype_bytes == 4 else "narrow"
    return HEAP_OVERHEAD_FRACTION[kind], sizes + (HEAP_BYTES if kind == "narrow" else 0)
