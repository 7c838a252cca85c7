"""Published figures of GPUs, to plan for one that this machine does not have."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from loratune.run.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator.

    Attributes:
        name: Its name for `--device`.
        memory_bytes: Memory of the device before anything is loaded.
        bf16_flops_per_second: Dense peak of bfloat16 products accumulated in float32, without sparsity.
        bytes_per_second: Bandwidth of its memory.
        source: The maker's document with these figures.
        has_fp8: Whether it multiplies fp8 with a scale for each row: Hopper and later.
        link: The usual link between several of them in a node, a name in `interconnect.LINKS`.
    """

    name: str
    memory_bytes: int
    bf16_flops_per_second: float
    bytes_per_second: float
    source: str
    has_fp8: bool
    link: str


def _device(
    name: str, gigabytes: int, teraflops: float, source: str, *, bandwidth: int, link: str, has_fp8: bool = False
) -> Device:
    """Return a device from published figures; the bandwidth is in GB/s."""
    return Device(
        name=name,
        memory_bytes=gigabytes * 10**9,
        bf16_flops_per_second=teraflops * 1e12,
        bytes_per_second=bandwidth * 1e9,
        source=f"NVIDIA, {source}",
        has_fp8=has_fp8,
        link=link,
    )


_HOPPER = "H100 datasheet (half of the figure with sparsity)"
_AMPERE = "A100 datasheet"
_GA102 = "GA102 GPU Architecture whitepaper, appendix A"
_ADA = "Ada GPU Architecture whitepaper, appendix A"

DEVICES = {
    device.name: device
    for device in (
        _device(
            "b200",
            180,
            2250,
            "DGX B200 datasheet (an eighth of it, half of the figure with sparsity)",
            bandwidth=8000,
            link="nvlink5",
            has_fp8=True,
        ),
        _device(
            "h200",
            141,
            989,
            "H200 datasheet (half of the figure with sparsity)",
            bandwidth=4800,
            link="nvlink4",
            has_fp8=True,
        ),
        _device("h100-80gb", 80, 989, _HOPPER, bandwidth=3350, link="nvlink4", has_fp8=True),
        _device("h100-pcie", 80, 756, _HOPPER, bandwidth=2000, link="pcie5", has_fp8=True),
        _device("a100-80gb", 80, 312, _AMPERE, bandwidth=2039, link="nvlink3"),
        _device("a100-40gb", 40, 312, _AMPERE, bandwidth=1555, link="nvlink3"),
        _device("l40s", 48, 362, "L40S datasheet", bandwidth=864, link="pcie4"),
        _device("l4", 24, 121, "L4 datasheet (half of the figure with sparsity)", bandwidth=300, link="pcie4"),
        _device("a10", 24, 125, "A10 datasheet", bandwidth=600, link="pcie4"),
        _device(
            "rtx5090",
            32,
            209.5,
            "RTX Blackwell GPU Architecture whitepaper, appendix A",
            bandwidth=1792,
            link="pcie5",
            has_fp8=True,
        ),
        _device("rtx4090", 24, 165.2, _ADA, bandwidth=1008, link="pcie4"),
        _device("rtx3090", 24, 71, _GA102, bandwidth=936, link="pcie4"),
    )
}


def find_device(name: str, *, option: str = "--device") -> Device:
    """Return the device of this name.

    Args:
        name: Upper case, spaces and underscores are accepted.
        option: The command-line option that named it, for the message.

    Raises:
        RecipeError: There is none in the table.
    """
    known = name.lower().replace("_", "-").replace(" ", "-")
    if known in DEVICES:
        return DEVICES[known]
    near = difflib.get_close_matches(known, DEVICES, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise RecipeError(f"unknown {option} {name}", fix=f"{hint}choose one of {', '.join(DEVICES)}")


def device_notes(device: Device | None, dtype: str) -> tuple[str, ...]:
    """Return a warning if the planned time on a named device is for another type than the recipe's."""
    if device is None or dtype != "float32":
        return ()
    return (
        f"the planned time on {device.name} is for bfloat16; model.dtype is float32, which is several times slower",
    )
