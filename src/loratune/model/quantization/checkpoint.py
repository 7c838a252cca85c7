"""Checkpoints that come quantised: what they need, and whether their weights stay packed.

Weights of bitsandbytes, torchao, GPTQ and AWQ are held as they are stored. Those of compressed-tensors, block-wise
fp8 and mxfp4 are expanded to the run's type as they load: transformers trains no adapter on packed mxfp4, products
with fp8 need kernels that it fetches from the hub, and compressed-tensors would expand its weights at the first
forward anyway.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loratune.run.errors import MachineError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXPANDED = ("compressed-tensors", "fp8", "mxfp4")
"""Methods whose weights are expanded as they load."""
_NEEDS = {
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
}
_EXTRAS = {
    "bitsandbytes": "'loratune[bitsandbytes]'",
    "torchao": "'loratune[torchao]'",
    "compressed_tensors": "'loratune[compressed-tensors]'",
}
_INSTEAD = "name the model as it was before quantisation"


def settings_of(config: PreTrainedConfig) -> Any:
    """What a model's config says of its quantisation, as a mapping or an object; None: nothing."""
    text: Any = config.get_text_config()
    return getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)


def method_of(config: PreTrainedConfig) -> str | None:
    """How the weights of a checkpoint come quantised; None: not at all."""
    settings = settings_of(config)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def comes_packed(config: PreTrainedConfig) -> bool:
    """Whether the weights come quantised and stay so."""
    return method_of(config) not in (None, *EXPANDED)


def rounds_inputs(config: PreTrainedConfig) -> bool:
    """Whether the layers of a checkpoint round the inputs of products as well."""
    settings = settings_of(config)
    if settings is None or not comes_packed(config):
        return False
    words = str(settings if isinstance(settings, dict) else settings.to_dict())
    return "DynamicActivation" in words or in_8_bits_by_bitsandbytes(config)


def in_8_bits_by_bitsandbytes(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is of the kind that `model.quantization: int8` makes."""
    settings = settings_of(config)
    return bool(
        settings.get("load_in_8bit") if isinstance(settings, dict) else getattr(settings, "load_in_8bit", False)
    )


def dequantize_on_load(config: PreTrainedConfig) -> None:
    """Let transformers expand the weights of a checkpoint as they load, where they do not stay packed."""
    settings = settings_of(config)
    if method_of(config) not in EXPANDED:
        return
    if isinstance(settings, dict):
        settings["dequantize"] = True
    else:
        settings.dequantize = True


def check_checkpoint(config: PreTrainedConfig, quantization: str, *, name: str, device: str) -> None:
    """Whether a checkpoint that comes quantised can be loaded and trained on here.

    Args:
        config: Of the model; weights that are to be expanded are marked so.
        quantization: The recipe's.
        name: The model's, for messages.
        device: cpu, cuda or mps.

    Raises:
        RecipeError: It would be quantised twice, or transformers cannot train an adapter on it.
        MachineError: What it needs is not on this machine.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    method = method_of(config)
    if method is None:
        return
    if quantization != "none":
        raise RecipeError(
            f"model.quantization is {quantization}, but the weights of {name} come quantised ({method})",
            fix="model.quantization=none",
        )
    what = f"model.name is {name}: its weights are quantised ({method})"
    missing = [package for package in _NEEDS.get(method, ()) if find_spec(package) is None]
    if missing:
        packages = " ".join(_EXTRAS.get(package, package) for package in missing)
        raise MachineError(
            f"{what}, which needs {' and '.join(missing)}: not installed", fix=f"pip install {packages}, or {_INSTEAD}"
        )
    dequantize_on_load(config)
    try:
        quantizer = AutoHfQuantizer.from_config(settings_of(config), pre_quantized=True)
        quantizer.validate_environment(device_map={"": device})
    except (ImportError, RuntimeError, ValueError) as error:
        raise MachineError(
            f"{what}, and cannot be loaded here: {error}", fix=f"install what is missing, or {_INSTEAD}"
        ) from error
    if method not in EXPANDED and not quantizer.is_trainable:
        raise RecipeError(
            f"model.name is {name}: transformers trains no adapter on weights quantised by {method}", fix=_INSTEAD
        )
