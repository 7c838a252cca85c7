"""The frozen base in 4 or 8 bits: how it loads, its bytes, what must be installed, and the values of its weights.

bitsandbytes quantizes to `nf4` and `int8` as the weights load. `nf4` (Dettmers et al. 2023, "QLoRA") stores 4 bits per
weight, a byte of scale per 64 weights, and a float per 256 of these bytes; products use unpacked weights. `int8`
(Dettmers et al. 2022, "LLM.int8()") stores a byte per weight and a float per output, and rounds inputs to 8 bits too,
with a scale per token. Its separate treatment of outlier columns is off, since a token's result would depend on its
micro-batch.

torchao quantizes to the kinds that end in `_weight_only` (`torchao`), also as the weights load; only weights are
rounded.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from loratune.model.kernels.packed_linear import PackedLinear, unpacked
from loratune.model.quantization.checkpoint import comes_packed
from loratune.model.quantization.kinds import BLOCK, BY_TORCHAO, GROUP, NESTED_BLOCK, package_of
from loratune.run.errors import MachineError, RecipeError
from loratune.run.extras import pip_install

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel


_TABLES = 4 * (16 + 256 + 1)
"""Bytes of the tables of each nf4 matrix: the 16 values of nf4, the 256 values of its scales, and their mean."""


def check_quantization(quantization: str, device: str, *, is_here: bool) -> None:
    """Check that the package that quantizes can run.

    Args:
        quantization: The recipe's `model.quantization`.
        device: cpu, cuda or mps.
        is_here: Whether the device is in this machine; the plan for another one needs no package.

    Raises:
        MachineError: The package is not installed, or does not train on the device.
    """
    package = package_of(quantization)
    if package is None:
        return
    if device == "mps":
        raise MachineError(
            f"model.quantization is {quantization}, which {package} trains on CUDA and CPUs only; this is an Apple GPU",
            fix="model.quantization=none, or train.device=cpu",
        )
    if is_here and find_spec(package) is None:
        raise MachineError(
            f"model.quantization is {quantization}, but {package} is not installed",
            fix=pip_install(package),
        )


def uncompiled(quantization: str, config: PreTrainedConfig) -> str:
    """Return why the layers of a quantized base run uncompiled; "" for a base whose layers can be compiled."""
    package = package_of(quantization)
    if package is not None:
        return f"the layers of {package} run uncompiled"
    return "layers stored quantized run uncompiled" if comes_packed(config) else ""


def load_settings(quantization: str, dtype: torch.dtype) -> Any:
    """Return the quantization config for `from_pretrained`; the output head and embeddings are not quantized."""
    from transformers import BitsAndBytesConfig

    if quantization in BY_TORCHAO:
        from loratune.model.quantization import torchao

        return torchao.settings(quantization)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_trainable(model: PreTrainedModel) -> None:
    """Make packed layers pass a gradient whatever ran before, without keeping unpacked weights for it."""
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights for good when it first runs in evaluation
        # mode, and gives no gradient to its input from then on. A run that is evaluated before its first step would
        # silently train only its last layers.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if getattr(model, "quantization_method", None) == "torchao":
        from loratune.model.quantization.torchao import use_packed_layers

        use_packed_layers(model)


def quantized_matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yield the matrices that are packed: all linear layers except the output head and what is tied to it.

    Args:
        model: The model before quantization; may be on the meta device.

    Raises:
        RecipeError: The architecture stores its matrices transposed.
    """
    spared = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if not should_convert_module(name, spared):
            continue
        if isinstance(module, Conv1D):
            raise RecipeError(
                f"{name} is stored transposed, as in GPT-2; such matrices cannot be quantized",
                fix="model.quantization=none; for a model published quantized, use the one without quantization",
            )
        if type(module) is torch.nn.Linear:
            yield name, module


def matrix_bytes(quantization: str, d_out: int, d_in: int, dtype_bytes: int) -> int:
    """Return the exact bytes of one quantized matrix with its scales and tables.

    Args:
        quantization: One of `PACKED`.
        d_out: Outputs of the matrix.
        d_in: Inputs of the matrix.
        dtype_bytes: Bytes of the run's type, in which int4_weight_only stores its scales.
    """
    if quantization == "int8":
        return d_out * d_in + 4 * d_out
    if quantization == "int8_weight_only":
        return d_out * d_in + 5 * d_out  # a float32 scale and the byte of a zero point, which is 0
    if quantization == "float8_weight_only":
        return d_out * d_in + 4 * d_out
    if quantization == "int4_weight_only":
        return d_out * d_in // 2 + d_out * (d_in // GROUP) * dtype_bytes
    scales = -(-d_out * d_in // BLOCK)
    return -(-d_out * d_in // 2) + scales + 4 * -(-scales // NESTED_BLOCK) + _TABLES


def base_bytes(model: PreTrainedModel, quantization: str, dtype_bytes: int) -> int:
    """Return the bytes of the entire base: quantized matrices, and everything else in the run's type.

    Args:
        model: The model before quantization, on the meta device.
        quantization: One of `PACKED`.
        dtype_bytes: Bytes of a weight that is not quantized.

    Raises:
        RecipeError: A matrix does not support this kind of quantization.
    """
    matrices = dict(quantized_matrices(model))
    odd = next((name for name, m in matrices.items() if m.in_features % GROUP), None)
    if quantization == "int4_weight_only" and odd is not None:
        raise RecipeError(
            f"model.quantization is int4_weight_only, which needs a multiple of {GROUP} inputs, but {odd} has "
            f"{matrices[odd].in_features}",
            fix="model.quantization=nf4",
        )
    others = sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in matrices.values())
    packed = sum(matrix_bytes(quantization, m.out_features, m.in_features, dtype_bytes) for m in matrices.values())
    return others * dtype_bytes + packed


def unpacked_bytes(model: PreTrainedModel, quantization: str, dtype_bytes: int) -> int:
    """Return the peak bytes of unpacking the largest matrix for a product.

    Args:
        model: The model before quantization.
        quantization: One of `PACKED`.
        dtype_bytes: Bytes of the run's type.
    """
    bytes_per_weight = {
        "int8_weight_only": dtype_bytes,  # converted, and scaled in place or after the product
        "int4_weight_only": 1 + dtype_bytes,  # a byte each, and converted
        # in float32, its scaled copy, and one in the run's type if that is another
        "float8_weight_only": 8 + (dtype_bytes if dtype_bytes < 4 else 0),
    }.get(quantization, 2 * dtype_bytes)  # values, and their scaled copy
    return bytes_per_weight * max(module.weight.numel() for _, module in quantized_matrices(model))


def as_multiplied(weight_OI: torch.Tensor, quantization: str, dtype: torch.dtype) -> torch.Tensor:
    """Quantize a weight and return the values that training multiplies with, in float32.

    Args:
        weight_OI: The weight as in the base's files, [O, I].
        quantization: One of `PACKED`.
        dtype: The run's type, in which the weight is quantized.
    """
    if quantization in BY_TORCHAO:
        from loratune.model.quantization.torchao import quantize_round_trip

        return quantize_round_trip(weight_OI.to(dtype), quantization)
    from bitsandbytes import functional

    if quantization == "int8":
        rows, scales, _ = functional.int8_vectorwise_quant(weight_OI.to(dtype).to(torch.float16))
        values: torch.Tensor = rows.float() * scales.float()[:, None] / 127
        return values
    packed, state = functional.quantize_4bit(
        weight_OI.to(dtype), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state).float()


def unpack_layers(model: PreTrainedModel) -> None:
    """Replace packed layers by plain ones in float32, with the values that training multiplies with.

    Args:
        model: A model that is stored quantized, from `load_model`, on a CPU; it is changed in place.
    """
    from peft.utils.integrations import dequantize_module_weight

    for name, module in list(model.named_modules()):
        layer: Any = module
        if isinstance(layer, PackedLinear):
            values = unpacked(layer.weight, torch.float32)
        elif type(layer.__dict__.get("_parameters", {}).get("weight")).__name__ in ("Params4bit", "Int8Params"):
            values = dequantize_module_weight(layer).float()
        else:
            continue
        plain = torch.nn.Linear(values.shape[1], values.shape[0], bias=layer.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(values, requires_grad=False)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        model.set_submodule(name, plain)
    plain_model: Any = model
    if hasattr(plain_model, "hf_quantizer"):
        plain_model.hf_quantizer.remove_quantization_config(plain_model)
    plain_model._weight_conversions = None  # transformers would reverse these to save the model, and pack it again
