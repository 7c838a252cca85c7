"""torchao's weight-only quantization: the configuration of each kind, and layers that train on it.

    int8_weight_only     a byte per weight, a float32 scale per output
    float8_weight_only   an e4m3 float per weight, a float32 scale per output
    int4_weight_only     4 bits per weight, symmetric, a scale in the run's type per 32 weights

torchao's own packed int4 layouts exist for GPUs only, and neither torchao nor PEFT passes a gradient through them. So
its 4-bit values (`IntxWeightOnlyConfig`), which it stores in a byte each, are packed two to a byte here.

Imports torchao, an optional package: import this module only where it is needed.

Shapes: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxUnpackedToInt8Tensor, quantize_
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor
from transformers import TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from loratune.model.kernels.packed_linear import PackedLinear, unpacked
from loratune.model.patching import replace_class
from loratune.model.quantization.kinds import GROUP


class Int4Packed(TorchAOBaseTensor):
    """A matrix in 4 bits per weight: two neighbors of a row in a byte, the first in its lower half.

    Args:
        qdata: [O, I / 2], int8.
        scale: [O, I / GROUP], in the type that the matrix had.
    """

    tensor_data_names = ["qdata", "scale"]  # noqa: RUF012 - as torchao declares them
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor) -> Any:
        shape = (qdata.shape[0], 2 * qdata.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=qdata.device)

    def __init__(self, qdata: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.qdata, self.scale = qdata, scale

    @classmethod
    def of(cls, weight_OI: torch.Tensor) -> Int4Packed:
        """Pack a matrix whose number of inputs is a multiple of GROUP."""
        loose = IntxUnpackedToInt8Tensor.from_hp(weight_OI, (1, GROUP), torch.int4)  # type: ignore[attr-defined]
        return cls((loose.qdata[:, ::2] & 15) | (loose.qdata[:, 1::2] << 4), loose.scale)

    def dequantize(self) -> torch.Tensor:
        """Return the matrix, [O, I], in the type that it had."""
        pairs = torch.stack(((self.qdata << 4) >> 4, self.qdata >> 4), -1)  # shifts of int8 extend the sign
        values = pairs.view(*self.scale.shape, GROUP).to(self.dtype).mul_(self.scale[..., None])
        return values.view(self.shape)


@Int4Packed.implements_torch_function(torch.nn.functional.linear)  # type: ignore[untyped-decorator]
def _int4_linear(func: Any, _types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, *bias = args
    out: torch.Tensor = func(x, weight.dequantize(), *bias, **(kwargs or {}))
    return out


@dataclass
class Int4PackedConfig(AOBaseConfig):
    """The configuration with which torchao's `quantize_` creates `Int4Packed`."""


@register_quantize_module_handler(Int4PackedConfig)  # type: ignore[untyped-decorator]
def _pack(module: torch.nn.Module, _config: Int4PackedConfig) -> torch.nn.Module:
    layer: Any = module
    layer.weight = torch.nn.Parameter(Int4Packed.of(layer.weight.detach()), requires_grad=False)
    return module


class _TrainableQuantizer(TorchAoHfQuantizer):
    """transformers' quantizer for torchao, marked as trainable for our int4 too."""

    is_trainable = True  # transformers decides by the config's name: only one with an 8 in it is trainable


def settings(quantization: str) -> TorchAoConfig:
    """Return the quantization config for `from_pretrained`; the output head and embeddings are not quantized.

    Args:
        quantization: One of `kinds.BY_TORCHAO`.
    """
    return TorchAoConfig(_config(quantization))


def _config(quantization: str) -> Any:
    if quantization == "int4_weight_only":
        return Int4PackedConfig()
    kinds = {"int8_weight_only": Int8WeightOnlyConfig, "float8_weight_only": Float8WeightOnlyConfig}
    # `set_inductor_config` would change the precision of all float32 products of the process.
    return kinds[quantization](set_inductor_config=False)


def use_packed_layers(model: torch.nn.Module) -> int:
    """Make linear layers with packed weights keep only these for the backward pass; return how many do."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and isinstance(m.weight, TorchAOBaseTensor)]
    for layer in layers:
        replace_class(layer, PackedLinear)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if type(quantizer) is TorchAoHfQuantizer and isinstance(quantizer.quantization_config.quant_type, Int4PackedConfig):
        replace_class(quantizer, _TrainableQuantizer)
    return len(layers)


def quantize_round_trip(weight_OI: torch.Tensor, quantization: str) -> torch.Tensor:
    """Quantize a matrix and return its values in float32.

    Args:
        weight_OI: The matrix, in the type in which it is quantized.
        quantization: One of `kinds.BY_TORCHAO`.
    """
    layer = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
    quantize_(layer, _config(quantization))
    return unpacked(layer.weight, torch.float32)
