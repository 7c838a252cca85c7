"""The frozen base in 4 or 8 bits: how it is loaded, what it takes, what has to be there, and what its weights are
worth.

`nf4` and `int8` are made by bitsandbytes while the weights load. `nf4` (Dettmers et al. 2023, "QLoRA") keeps 4 bits a
weight, a byte of scale for every 64 weights, and a float for every 256 of these bytes; products are made with
unpacked weights. `int8` (Dettmers et al. 2022, "LLM.int8()") keeps a byte a weight and a float for each output;
inputs are rounded to 8 bits as well, with a scale for each token. Its separate treatment of outlying columns is off,
since it would make a token's result depend on its micro-batch.

Kinds that end in `_weight_only` are made by torchao (`packed.py`), likewise while the weights load; nothing but
weights is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
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

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_TABLES = 4 * (16 + 256 + 1)
"""Bytes that each nf4 matrix has beside its own: the 16 values of nf4, the 256 of its scales, and their mean."""


def check_quantization(quantization: str, device: str, *, is_here: bool) -> None:
    """Whether the package that quantises can run.

    Args:
        quantization: The recipe's.
        device: cpu, cuda or mps.
        is_here: Whether the device is on this machine.

    Raises:
        MachineError: It is not installed, or its layers are not known to train on the device.
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
            fix=f"pip install 'loratune[{package}]'",
        )


def uncompiled(quantization: str, config: PreTrainedConfig) -> str:
    """Why the layers of a quantised base run uncompiled; empty where it is none of these."""
    package = package_of(quantization)
    if package is not None:
        return f"the layers of {package} run uncompiled"
    return "layers that come quantised run uncompiled" if comes_packed(config) else ""


def load_settings(quantization: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` quantises by. Not the output head and not embeddings."""
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
    """Let packed layers pass a gradient whatever ran before, and keep nothing unpacked for it.

    On CPUs with AVX512-BF16, bitsandbytes packs a layer's weights anew when it first runs in evaluation mode, for
    good, and what is packed so gives no gradient to its input. So a run that is evaluated before its first step would
    train nothing but its last layers, without a word. Layers of torchao get another class: see
    `kernels.packed_linear`.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if getattr(model, "quantization_method", None) == "torchao":
        from loratune.model.quantization.torchao import use_packed_layers

        use_packed_layers(model)


def quantized_matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The matrices that are packed: all linear layers but the output head and what is tied to it.

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
                f"{name} is stored transposed, as in GPT-2, which is not quantised",
                fix="model.quantization=none; of a checkpoint that comes quantised, the model as it was before",
            )
        if type(module) is torch.nn.Linear:
            yield name, module


def matrix_bytes(quantization: str, d_out: int, d_in: int, dtype_bytes: int) -> int:
    """Bytes of one quantised matrix with all that belongs to it, exactly.

    Args:
        quantization: One of `PACKED`.
        d_out: Outputs.
        d_in: Inputs.
        dtype_bytes: Of the run's type, in which int4_weight_only has its scales.
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
    """Bytes of the whole base: quantised matrices, and everything else in its type.

    Args:
        model: Before quantisation, on the meta device.
        quantization: One of `PACKED`.
        dtype_bytes: Of a weight that is not quantised.

    Raises:
        RecipeError: A matrix cannot be quantised so.
    """
    matrices = dict(quantized_matrices(model))
    odd = next((name for name, m in matrices.items() if m.in_features % GROUP), None)
    if quantization == "int4_weight_only" and odd is not None:
        raise RecipeError(
            f"model.quantization is int4_weight_only, which takes groups of {GROUP} inputs, but {odd} has "
            f"{matrices[odd].in_features}",
            fix="model.quantization=nf4",
        )
    others = sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in matrices.values())
    packed = sum(matrix_bytes(quantization, m.out_features, m.in_features, dtype_bytes) for m in matrices.values())
    return others * dtype_bytes + packed


def unpacked_bytes(model: PreTrainedModel, quantization: str, dtype_bytes: int) -> int:
    """Bytes of the largest matrix as it is unpacked for a product, with what is made on the way.

    Args:
        model: Before quantisation.
        quantization: One of `PACKED`.
        dtype_bytes: Of the run's type.
    """
    a_weight = {
        "int8_weight_only": dtype_bytes,  # converted, and scaled in place or after the product
        "int4_weight_only": 1 + dtype_bytes,  # a byte each, and converted
        "float8_weight_only": 8
        + (dtype_bytes if dtype_bytes < 4 else 0),  # float32, scaled, and rounded where the type is another
    }.get(quantization, 2 * dtype_bytes)  # values, and their scaled copy
    return a_weight * max(module.weight.numel() for _, module in quantized_matrices(model))


def as_multiplied(weight_OI: torch.Tensor, quantization: str, dtype: torch.dtype) -> torch.Tensor:
    """What a weight is worth after quantisation: the values that training multiplied with, in float32.

    Args:
        weight_OI: As in the base's files.
        quantization: One of `PACKED`.
        dtype: In which it was quantised: that of the run.
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
    """Make a checkpoint that came quantised a plain model: packed layers become plain ones, in float32, with the
    weights that training multiplied with.

    Args:
        model: As `load_model` gives it, on a CPU; changed in place.
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
    whole: Any = model
    if hasattr(whole, "hf_quantizer"):
        whole.hf_quantizer.remove_quantization_config(whole)
    whole._weight_conversions = None  # those of loading, which transformers would reverse to save it: packed again
