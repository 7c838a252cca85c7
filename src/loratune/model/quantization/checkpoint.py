"""Base models that are published quantized: what they need, and whether their weights stay packed.

Weights of bitsandbytes, torchao, GPTQ and AWQ stay as they are stored. Those of compressed-tensors, block-wise fp8 and
mxfp4 are expanded to the run's type as they load: transformers cannot train an adapter on packed mxfp4, fp8 products
need kernels that transformers fetches from the Hub, and compressed-tensors would expand its weights in the first
forward anyway.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loratune.run.errors import MachineError, RecipeError
from loratune.run.extras import pip_install

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXPANDED = ("compressed-tensors", "fp8", "mxfp4")
"""Methods whose weights are expanded as they load."""

# Method → packages that it needs.
_NEEDS = {
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
}
_EXTRAS = ("bitsandbytes", "torchao", "compressed_tensors")
"""Packages whose version an extra of the same name states."""
_INSTEAD = "use the model without quantization"


def settings_of(config: PreTrainedConfig) -> Any:
    """Return the quantization config of a model, a mapping or an object; None if it is not quantized."""
    text: Any = config.get_text_config()
    return getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)


def method_of(config: PreTrainedConfig) -> str | None:
    """Return the method by which a model is quantized, by transformers' name; None if it is not quantized."""
    settings = settings_of(config)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def comes_packed(config: PreTrainedConfig) -> bool:
    """Tell whether the weights are stored quantized and stay packed in memory."""
    return method_of(config) not in (None, *EXPANDED)


def rounds_inputs(config: PreTrainedConfig) -> bool:
    """Tell whether the layers of a quantized model round the inputs of products too, not only the weights."""
    settings = settings_of(config)
    if settings is None or not comes_packed(config):
        return False
    words = str(settings if isinstance(settings, dict) else settings.to_dict())
    return "DynamicActivation" in words or in_8_bits_by_bitsandbytes(config)


def in_8_bits_by_bitsandbytes(config: PreTrainedConfig) -> bool:
    """Tell whether a model is quantized in the way of `model.quantization: int8`."""
    settings = settings_of(config)
    return bool(
        settings.get("load_in_8bit") if isinstance(settings, dict) else getattr(settings, "load_in_8bit", False)
    )


def dequantize_on_load(config: PreTrainedConfig) -> None:
    """Make transformers expand the weights of a quantized model as they load, unless they stay packed."""
    settings = settings_of(config)
    if method_of(config) not in EXPANDED:
        return
    if isinstance(settings, dict):
        settings["dequantize"] = True
    else:
        settings.dequantize = True


def check_checkpoint(config: PreTrainedConfig, quantization: str, *, name: str, device: str) -> None:
    """Check that a model, if it is stored quantized, can be loaded and trained on here.

    Args:
        config: The model's configuration; it is changed as by `dequantize_on_load`.
        quantization: The recipe's `model.quantization`.
        name: The model's name, for messages.
        device: cpu, cuda or mps.

    Raises:
        RecipeError: It would be quantized twice, or transformers cannot train an adapter on it.
        MachineError: This machine lacks a package or device that the model needs.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    method = method_of(config)
    if method is None:
        return
    if quantization != "none":
        raise RecipeError(
            f"model.quantization is {quantization}, but the weights of {name} are already quantized ({method})",
            fix="model.quantization=none",
        )
    what = f"model.name is {name}: its weights are quantized ({method})"
    missing = [package for package in _NEEDS.get(method, ()) if find_spec(package) is None]
    if missing:
        command = (
            pip_install(missing[0].replace("_", "-")) if missing[0] in _EXTRAS else f"pip install {' '.join(missing)}"
        )
        raise MachineError(
            f"{what}, which needs {' and '.join(missing)}: not installed", fix=f"{command}, or {_INSTEAD}"
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
            f"model.name is {name}: transformers cannot train an adapter on weights quantized by {method}", fix=_INSTEAD
        )
