"""What a quantized base changes in a plan: where it can run, its bytes, and what the plan cannot tell about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.model.device import check_fp8, no_fp8, torch_dtype
from loratune.model.quantization.checkpoint import comes_packed, in_8_bits_by_bitsandbytes, method_of
from loratune.model.quantization.kinds import PACKED
from loratune.model.quantization.quantize import base_bytes, check_quantization, unpacked_bytes
from loratune.model.safetensors_headers import packed_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from loratune.planning.hardware.devices import Device


def check_device_can_quantize(quantization: str, where: str, device: Device | None) -> None:
    """Check that the device can train a base of this quantization.

    Args:
        quantization: The recipe's `model.quantization`.
        where: cpu, cuda or mps.
        device: The named device to plan for; None for this machine.

    Raises:
        MachineError: It cannot, or a package is missing.
    """
    check_quantization(quantization, where, is_here=device is None)
    if quantization != "fp8":
        return
    if device is None:
        check_fp8(where)
    elif not device.has_fp8:
        raise no_fp8(device.name)


def quantized_setup(quantization: str, folder: Path, model: PreTrainedModel, dtype: str) -> dict[str, Any]:
    """Return the fields of `ExecutionSetup` that a quantized base decides.

    Args:
        quantization: The recipe's `model.quantization`.
        folder: Folder of the base model. Weights that are stored quantized are held as they are stored.
        model: The model on the meta device, before quantization.
        dtype: Name of the type of what is not quantized.
    """
    dtype_bytes = torch_dtype(dtype).itemsize
    unpacked_as = quantization
    if quantization in PACKED:
        weights_bytes: int | None = base_bytes(model, quantization, dtype_bytes)
    elif comes_packed(model.config):
        quantization = "int8" if in_8_bits_by_bitsandbytes(model.config) else quantization
        # Of torchao's kinds, the one that takes the most memory to unpack: the checkpoint may mix them.
        unpacked_as = "float8_weight_only" if method_of(model.config) == "torchao" else quantization
        weights_bytes = packed_bytes(folder, model, dtype_bytes)
    else:
        return {"quantization": quantization}
    return {
        "quantization": quantization,
        "weights_bytes": weights_bytes,
        "unpacked_bytes": unpacked_bytes(model, unpacked_as, dtype_bytes),
    }


def quantization_notes(quantization: str, dtype: str) -> tuple[str, ...]:
    """Return a warning if the planned time leaves the unpacking of the weights out."""
    if quantization not in PACKED:
        return ()
    return (f"the planned time is for matrix products in {dtype}; unpacking the {quantization} weights adds to it",)
