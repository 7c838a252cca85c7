"""The frozen base in 4 or 8 bits: how it is loaded, what it takes, what has to be there, and what its weights are worth.

`nf4` and `int8` are made by bitsandbytes while the weights load. `nf4` (Dettmers et al. 2023, "QLoRA") keeps 4 bits a weight, a
byte of scale for every 64 weights, and a float for every 256 of these bytes; products are made with unpacked weights. `int8`
(Dettmers et al. 2022, "LLM.int8()") keeps a byte a weight and a float for each output; inputs are rounded to 8 bits as well, with a scale for
each token. Its separate treatment of outlying columns is off, since it would make a token's result depend on its micro-batch.
Checkpoints that come quantised are loaded as transformers loads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from loratune.errors import MachineError, RecipeError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

BY_BITSANDBYTES = ("nf4", "int8")
BLOCK = 64
"""Weights that share a scale in nf4."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own."""
_TABLES = 4 * (16 + 256 + 1)
"""Bytes that each nf4 matrix has beside its own: the 16 values of nf4, the 256 of its scales, and their mean."""


def check_quantization(quantization: str, device: str, *, is_here: bool) -> None:
    """Whether bitsandbytes can run.

    Args:
        quantization: `nf4` or `int8`; others need no bitsandbytes.
        device: cpu, cuda or mps.
        is_here: Whether the device is on this machine.

    Raises:
        MachineError: It is not installed, or its layers are not known to train on the device.
    """
    if quantization not in BY_BITSANDBYTES:
        return
    if device == "mps":
        raise MachineError(
            f"model.quantization is {quantization}, which bitsandbytes trains on CUDA and CPUs only; this is an Apple GPU",
            fix="model.quantization=none, or train.device=cpu",
        )
    if is_here and find_spec("bitsandbytes") is None:
        raise MachineError(
            f"model.quantization is {quantization}, but bitsandbytes is not installed",
            fix="pip install 'loratune[bitsandbytes]'",
        )


def check_checkpoint(config: PreTrainedConfig, quantization: str, *, name: str, device: str) -> None:
    """Whether a checkpoint that comes quantised can be loaded and trained on here.

    Args:
        config: Of the model.
        quantization: The recipe's.
        name: The model's, for messages.
        device: cpu, cuda or mps.

    Raises:
        RecipeError: It would be quantised twice, or transformers cannot train an adapter on it.
        MachineError: What it needs is not on this machine.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    if quantization != "none":
        raise RecipeError(
            f"model.quantization is {quantization}, but the weights of {name} come quantised ({method})",
            fix="model.quantization=none",
        )
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device})
    except (ImportError, RuntimeError, ValueError) as error:
        raise MachineError(
            f"model.name is {name}: its weights are quantised ({method}), and cannot be loaded here: {error}",
            fix="install what is missing, or name the model as it was before quantisation",
        ) from error
    if not quantizer.is_trainable:
        raise RecipeError(
            f"model.name is {name}: transformers trains no adapter on weights quantised by {method}",
            fix="name the model as it was before quantisation",
        )


def uncompiled(quantization: str, config: PreTrainedConfig) -> str:
    """Why the layers of a quantised base run uncompiled; empty where it is none of these."""
    if quantization in BY_BITSANDBYTES:
        return "the layers of bitsandbytes run uncompiled"
    return "layers that come quantised run uncompiled" if getattr(config, "quantization_config", None) else ""


def load_settings(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` quantises by. Not the output head and not embeddings."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Let evaluation leave 4-bit weights as training needs them.

    On CPUs with AVX512-BF16, bitsandbytes packs a layer's weights anew when it first runs in evaluation mode, for good, and what
    is packed so gives no gradient to its input. So a run that is evaluated before its first step would train nothing but its last
    layers, without a word.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantised_matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The matrices that bitsandbytes takes: all linear layers but the output head and what is tied to it.

    Args:
        model: As it was before quantisation; may be on the meta device.

    Raises:
        RecipeError: The architecture keeps its matrices transposed.
    """
    spared = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if not should_convert_module(name, spared):
            continue
        if isinstance(module, Conv1D):
            raise RecipeError(
                f"{name} is stored transposed, as in GPT-2, which is not trained with nf4 or int8",
                fix="model.quantization=none",
            )
        if type(module) is torch.nn.Linear:
            yield name, module


def matrix_bytes(quantization: str, d_out: int, d_in: int) -> int:
    """Bytes of one quantised matrix with all that belongs to it, exactly."""
    if quantization == "int8":
        return d_out * d_in + 4 * d_out
    scales = -(-d_out * d_in // BLOCK)
    return -(-d_out * d_in // 2) + scales + 4 * -(-scales // NESTED_BLOCK) + _TABLES


def base_bytes(model: PreTrainedModel, quantization: str, dtype_bytes: int) -> int:
    """Bytes of the whole base: quantised matrices, and everything else in its type.

    Args:
        model: Before quantisation, on the meta device.
        quantization: `nf4` or `int8`.
        dtype_bytes: Of a weight that is not quantised.
    """
    matrices = dict(quantised_matrices(model))
    others = sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in matrices.values())
    return others * dtype_bytes + sum(matrix_bytes(quantization, *m.weight.shape) for m in matrices.values())


def unpacked_bytes(model: PreTrainedModel, dtype_bytes: int) -> int:
    """Bytes of the largest matrix as it is unpacked for a product, twice: its values, and their scaled copy."""
    return 2 * dtype_bytes * max(module.weight.numel() for _, module in quantised_matrices(model))


def as_multiplied(weight_OI: torch.Tensor, quantization: str, dtype: torch.dtype) -> torch.Tensor:
    """What a weight is worth after quantisation: the values that training multiplied with, in float32.

    Args:
        weight_OI: As in the base's files.
        quantization: `nf4` or `int8`.
        dtype: In which it was quantised: that of the run.
    """
    from bitsandbytes import functional

    if quantization == "int8":
        rows, scales, _ = functional.int8_vectorwise_quant(weight_OI.to(dtype).to(torch.float16))
        values: torch.Tensor = rows.float() * scales.float()[:, None] / 127
        return values
    packed, state = functional.quantize_4bit(
        weight_OI.to(dtype), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    unpacked: torch.Tensor = functional.dequantize_4bit(packed, state).float()
    return unpacked
