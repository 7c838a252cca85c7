"""What GPUs reach: measured by `benchmarks/gpu/run.sh` where somebody has run it, else taken from published figures.

`measured.jsonl` beside this module has one line for each measured device; `benchmarks/gpu/add_device.py` writes it from
the script's `results.json`. **It is empty: no GPU has run loratune.**
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.planning.speed import GpuRates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratune.planning.hardware.devices import Device

TABLE = Path(__file__).with_name("measured.jsonl")

PRODUCT_EFFICIENCY = 0.8
"""The fraction of the published peak that bfloat16 products reach: 790 of 989 TFLOP/s on an H100."""

BANDWIDTH_EFFICIENCY = 0.9
"""The fraction of the published bandwidth that a copy reaches: 3.0 of 3.35 TB/s on an H100."""

LAUNCH_SECONDS = 5e-6
"""Seconds of the host for one operation in eager mode. An estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDevice:
    """A line of the table.

    Attributes:
        device: Its name in `devices.DEVICES`.
        machine: Its name as torch reports it.
        products: Floating-point operations per second of large bfloat16 products.
        copies: Bytes per second of a copy, read and written.
        launch_seconds: Seconds of the host for one small operation.
        torch: Version of torch.
        commit: Commit of loratune.
    """

    device: str
    machine: str
    products: float
    copies: float
    launch_seconds: float
    torch: str
    commit: str

    def as_line(self) -> str:
        """Return the line of the table."""
        return json.dumps(asdict(self)) + "\n"


def from_results(device: str, results: Mapping[str, Any]) -> MeasuredDevice:
    """Return what `results.json` of the script says of a device.

    Args:
        device: Its name in `devices.DEVICES`.
        results: The content of the file.

    Raises:
        ValueError: The file is of a dry run, or its first step failed.
    """
    lines = results["results"]
    machine = next((line for line in lines if "machine" in line and "capability" in line), None)
    rates = next((line for line in lines if line.get("rates")), None)
    if machine is None or rates is None:
        raise ValueError("the results lack the step `machine`: no rates were measured")
    if machine["capability"] is None:
        raise ValueError(f"the results are of a dry run on a {machine['machine']}")
    return MeasuredDevice(
        device=device,
        machine=machine["machine"],
        products=rates["matmul_flops_per_second"],
        copies=rates["copied_bytes_per_second"],
        launch_seconds=rates["launch_seconds"],
        torch=machine["versions"]["torch"],
        commit=results["commit"] or "unknown",
    )


def measured_device(name: str) -> MeasuredDevice | None:
    """Return the last line of the table for a device; None if nobody has measured it."""
    lines = [MeasuredDevice(**json.loads(line)) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    return next((line for line in reversed(lines) if line.device == name), None)


def gpu_rates(device: Device) -> tuple[GpuRates, str]:
    """Return what a device reaches, and where that is from, for people."""
    found = measured_device(device.name)
    if found is None:
        published = GpuRates(
            products=device.bf16_flops_per_second * PRODUCT_EFFICIENCY,
            copies=device.memory_bytes_per_second * BANDWIDTH_EFFICIENCY,
            launch_seconds=LAUNCH_SECONDS,
        )
        return published, f"published figures of {device.name}, on which loratune has never been measured"
    rates = GpuRates(products=found.products, copies=found.copies, launch_seconds=found.launch_seconds)
    source = f"rates of products, copies and launches measured on {found.machine} with torch {found.torch}"
    return rates, source
