"""The weight-only kinds of torchao: what each is made by, and the layers that hold them.

`int8_weight_only`: a byte a weight, a float for each output. `float8_weight_only`: an e4m3 float a weight, a float for each output.
`int4_weight_only`: 4 bits a weight, symmetric, and a scale in the run's type for every 32. torchao's own packed int4 layouts exist for
GPUs alone, and neither it nor PEFT passes a gradient through them; so its values of 4 bits (`IntxWeightOnlyConfig`), which it keeps in a byte
each, are packed two to a byte here.

Imports torchao: only for those who have it.
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
from loratune.model.quantization.kinds import GROUP


class Int4Packed(TorchAOBaseTensor):
    """A matrix in 4 bits, two neighbours of a row in a byte, the first in its lower half.

    Args:
        qdata: [O, I / 2], int8.
        scale: [O, I / GROUP], in the type of the matrix.
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
        """The packed form of a matrix, whose rows are whole groups."""
        made = IntxUnpackedToInt8Tensor.from_hp(weight_OI, (1, GROUP), torch.int4)  # type: ignore[attr-defined]
        return cls((made.qdata[:, ::2] & 15) | (made.qdata[:, 1::2] << 4), made.scale)

    def dequantize(self) -> torch.Tensor:
        """[O, I], in the type of the matrix."""
        pairs = torch.stack(((self.qdata << 4) >> 4, self.qdata >> 4), -1)
        values = pairs.view(*self.scale.shape, GROUP).to(self.dtype).mul_(self.scale[..., None])
        return values.view(self.shape)


@Int4Packed.implements_torch_function(torch.nn.functional.linear)  # type: ignore[untyped-decorator]
def _int4_linear(func: Any, _types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, *bias = args
    out: torch.Tensor = func(x, weight.dequantize(), *bias, **(kwargs or {}))
    return out


@dataclass
class Int4PackedConfig(AOBaseConfig):
    """What torchao's `quantize_` makes `Int4Packed` by."""


@register_quantize_module_handler(Int4PackedConfig)  # type: ignore[untyped-decorator]
def _pack(module: torch.nn.Module, _config: Int4PackedConfig) -> torch.nn.Module:
    layer: Any = module
    layer.weight = torch.nn.Parameter(Int4Packed.of(layer.weight.detach()), requires_grad=False)
    return module


class _TrainableQuantizer(TorchAoHfQuantizer):
    """transformers goes by the name of the config, and lets its trainer take those with an 8 in it only."""

    is_trainable = True


def settings(quantization: str) -> TorchAoConfig:
    """What `from_pretrained` quantises by. Not the output head and not embeddings.

    Args:
        quantization: One of the three kinds.
    """
    return TorchAoConfig(_config(quantization))


def _config(quantization: str) -> Any:
    if quantization == "int4_weight_only":
        return Int4PackedConfig()
    kinds = {"int8_weight_only": Int8WeightOnlyConfig, "float8_weight_only": Float8WeightOnlyConfig}
    return kinds[quantization](set_inductor_config=False)  # which would change float32 products of the whole process


def use_packed_layers(model: torch.nn.Module) -> int:
    """Let linear layers whose weights are packed keep nothing else for the backward; the number of them."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and isinstance(m.weight, TorchAOBaseTensor)]
    for layer in layers:
        layer.__class__ = PackedLinear
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if type(quantizer) is TorchAoHfQuantizer and isinstance(quantizer.quantization_config.quant_type, Int4PackedConfig):
        quantizer.__class__ = _TrainableQuantizer
    return len(layers)


def quantize_round_trip(weight_OI: torch.Tensor, quantization: str) -> torch.Tensor:
    """What a matrix is worth after quantisation, in float32.

    Args:
        weight_OI: In the type in which it is quantised.
        quantization: One of the three kinds.
    """
    layer = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
    quantize_(layer, _config(quantization))
    return unpacked(layer.weight, torch.float32)
