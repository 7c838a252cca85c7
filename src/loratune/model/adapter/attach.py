"""The LoRA adapter on a model, by PEFT."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers.pytorch_utils import Conv1D

from loratune.model.adapter.modules_to_save import fully_trained_modules, keep_in_float32, modules_to_save_arguments
from loratune.model.adapter.new_tokens import resize_embeddings, resize_for_adapter, use_fast_rows
from loratune.model.adapter.patterns import checked_patterns
from loratune.model.adapter.target_parameters import resolve_target_parameters, target_parameter_arguments
from loratune.model.adapter.variants import (
    changes_base,
    has_changed_base,
    keep_beginning,
    peft_arguments,
    save_as_plain,
    whole,
)
from loratune.model.classifier import BY_PEFT, Classes
from loratune.model.kernels.fp8_linear import Fp8Linear
from loratune.model.kernels.lora_linear import lora_linear, lora_update
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach_adapter(
    model: PreTrainedModel,
    lora: LoraSection,
    targets: tuple[str, ...],
    *,
    base_name: str,
    seed: int,
    new_tokens: tuple[int, ...] = (),
    classes: Classes | None = None,
) -> PeftModel:
    """Put a fresh adapter on the target modules; everything else is frozen.

    The model answers as before: B starts at zero, or B·A is taken out of the base's weights. What is drawn comes from a
    generator seeded with `seed`, whatever was drawn before. Adapter weights are float32 whatever the base is (PEFT's
    `autocast_adapter_dtype`).

    Args:
        model: The base; its weights are changed by some of the variants.
        lora: Ranks, scales, dropout, variant.
        targets: Full module names, from `resolve_targets`.
        base_name: What `base_model_name_or_path` of the saved adapter says.
        seed: Of the initial weights.
        new_tokens: The numbers of `lora.new_tokens`, for which the model grows.
        classes: Of a classifier, whose head is trained whole; None: the model writes text.
    """
    resize_embeddings(model, new_tokens)
    if classes is None:
        beside = modules_to_save_arguments(fully_trained_modules(model, lora, targets), new_tokens)
    else:
        beside = {"modules_to_save": [name for name in classes.head if name not in BY_PEFT] or None}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=whole(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=list(short_module_names(model, targets)),
        task_type=TaskType.CAUSAL_LM if classes is None else TaskType.SEQ_CLS,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        **peft_arguments(lora),
        **target_parameter_arguments(resolve_target_parameters(model, lora, targets), lora),
        **beside,
    )
    model.name_or_path = base_name  # PEFT takes the base's name from here
    with torch.random.fork_rng(), checked_patterns():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    keep_in_float32(adapted)
    if new_tokens:
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.bias = None  # it has none, but PEFT's wrapper does not say so, and TRL's loss asks
    if changes_base(lora):
        keep_beginning(adapted)
    return adapted


def short_module_names(model: torch.nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The last parts of the names where these choose the same modules, as servers such as vLLM expect; else the full
    names."""
    leaves = {name.rpartition(".")[2] for name in targets}
    chosen = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves)) if chosen == set(targets) else tuple(sorted(targets))


def use_fast_layers(model: PeftModel) -> int:
    """Let PEFT's plain LoRA layers compute with `kernels.lora_linear`; the number of layers that do.

    PEFT makes the update in three passes over each layer's output and in float32. The class of each layer object is
    replaced by one with another `forward`; with the adapter off or merged, and for every other kind of layer, PEFT's own
    runs.
    """
    use_fast_rows(model)
    layers = [module for module in model.modules() if _has_fast_class(type(module)) and _is_plain(module)]
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = fast_class(kind)
    return len(layers)


def fallback_note(model: PeftModel) -> str:
    """That some of the adapted matrices run PEFT's own forward after `use_fast_layers`; empty where none does."""
    if any(type(module) is TrainableTokensLayer for module in model.modules()):
        return "the rows of new tokens run PEFT's own forward, which copies the whole embedding, not the fast one"
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    left = [layer for layer in layers if not getattr(layer, "is_fast", False)]
    if not left:
        return ""
    kinds = ", ".join(sorted({type(layer.get_base_layer()).__name__ for layer in left}))
    return f"{len(left)} of {len(layers)} adapted matrices ({kinds}) run PEFT's own forward, not the fast one"


def _has_fast_class(kind: type) -> bool:
    # By name: PEFT's layers on packed weights exist only where the package is installed.
    return kind is LoraLinear or (kind.__module__, kind.__name__) in _ON_PACKED


_ON_PACKED = {
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
}


def _is_plain(layer: Any) -> bool:
    on_packed = type(layer) is not LoraLinear
    return (
        (on_packed or type(layer.base_layer) in (torch.nn.Linear, Fp8Linear))
        and not layer.lora_variant
        and not layer.lora_bias.get("default", False)
    )


@cache
def fast_class(kind: Any) -> Any:
    """PEFT's layer class with the same parameters and state, computed by `kernels.lora_linear`."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.active_adapters != ["default"]:
            out: torch.Tensor = kind.forward(self, x, *args, **kwargs)
            return out
        base, drop = self.base_layer, self.lora_dropout["default"]
        dropout = drop.p if self.training and isinstance(drop, torch.nn.Dropout) else 0.0
        a, b, scale = self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]
        if type(base) is not torch.nn.Linear:
            return base(x) + lora_update(x, a, b, scale, dropout)
        return lora_linear(x, base.weight, base.bias, a, b, scale, dropout)

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "is_fast": True})


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that the optimizer changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_file(folder: Path) -> Path:
    """The weights of a saved adapter.

    Raises:
        RecipeError: They are not stored as safetensors.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise RecipeError(
            "no adapter_model.safetensors in it",
            file=folder,
            fix="convert the adapter: only safetensors are loaded, because other formats can run code",
        )
    return file


def load_adapter(base: Any, folder: Path, **settings: Any) -> PeftModel:
    """The model with a saved adapter, from safetensors only; it grows for the adapter's new tokens.

    Args:
        base: The base model.
        folder: In PEFT's format.
        settings: Of PEFT's own `from_pretrained`.

    Raises:
        RecipeError: The adapter is not stored as safetensors.
    """
    adapter_file(folder)
    resize_for_adapter(base, folder)
    with checked_patterns():
        adapted = PeftModel.from_pretrained(base, str(folder), **settings)
    assert isinstance(adapted, PeftModel)
    return adapted


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's format, as safetensors, for the base as it was before `attach_adapter`."""
    if has_changed_base(model):
        save_as_plain(model, folder)
        return
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
