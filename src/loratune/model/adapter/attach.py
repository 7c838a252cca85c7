"""The LoRA adapter on a model: PEFT attaches, loads and saves it; our kernels compute it."""

from __future__ import annotations

from functools import cache
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
    as_int_if_whole,
    changes_base,
    has_changed_base,
    keep_initial_values,
    peft_arguments,
    save_as_plain,
)
from loratune.model.classifier import BY_PEFT, Classes
from loratune.model.kernels.dropout import AdapterDropout
from loratune.model.kernels.fp8_linear import Fp8Linear
from loratune.model.kernels.lora_linear import lora_linear, lora_update
from loratune.model.patching import replace_class
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from loratune.recipe.recipe import LoraSection


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
    """Attach a fresh adapter to the target modules and freeze everything else.

    The model's outputs do not change: B starts at zero, or the initial B·A is subtracted from the base's weights.
    Adapter weights are float32 whatever the base's type (PEFT's `autocast_adapter_dtype`).

    Args:
        model: The base model, whose weights some variants change (`variants.changes_base`).
        lora: The recipe's section: ranks, scales, dropout, variant.
        targets: Full module names, from `resolve_targets`.
        base_name: Becomes `base_model_name_or_path` in the saved adapter.
        seed: Seed of the initial weights, independent of what was drawn before.
        new_tokens: Ids of `lora.new_tokens`, for which embedding and head grow.
        classes: The classes of a classifier, whose head is trained in full; None: a causal language model.
    """
    resize_embeddings(model, new_tokens)
    if classes is None:
        in_full = modules_to_save_arguments(fully_trained_modules(model, lora, targets), new_tokens)
    else:
        in_full = {"modules_to_save": [name for name in classes.head if name not in BY_PEFT] or None}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=as_int_if_whole(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=list(short_module_names(model, targets)),
        task_type=TaskType.CAUSAL_LM if classes is None else TaskType.SEQ_CLS,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        **peft_arguments(lora),
        **target_parameter_arguments(resolve_target_parameters(model, lora, targets), lora),
        **in_full,
    )
    model.name_or_path = base_name  # PEFT takes the base's name from here
    with torch.random.fork_rng(), checked_patterns():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    keep_in_float32(adapted)
    if new_tokens:
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.bias = None  # TRL's loss reads it, and PEFT's wrapper lacks the attribute
    if changes_base(lora):
        keep_initial_values(adapted)
    return adapted


def short_module_names(model: torch.nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return the last parts of the names if these match the same modules, as servers such as vLLM expect.

    Otherwise return the full names.
    """
    leaves = {name.rpartition(".")[2] for name in targets}
    chosen = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves)) if chosen == set(targets) else tuple(sorted(targets))


def use_fast_layers(model: PeftModel) -> int:
    """Make PEFT's plain LoRA layers compute with `kernels.lora_linear`; return how many do.

    PEFT computes the update in float32 and in three passes over each layer's output. PEFT's own `forward` still runs
    for every other kind of layer, and while the adapter is off or merged.
    """
    use_fast_rows(model)
    use_repeatable_dropout(model)
    layers = [module for module in model.modules() if _has_fast_class(type(module)) and _is_plain(module)]
    for layer in layers:
        kind: Any = type(layer)
        replace_class(layer, fast_class(kind))
    return len(layers)


def use_repeatable_dropout(model: PeftModel) -> None:
    """Replace the dropout of every LoRA layer, of PEFT's own forward too, by one that needs no random generator."""
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        drop = dict(layer.lora_dropout.items()).get("default")
        if type(drop) is torch.nn.Dropout:
            device = next(layer.parameters()).device
            layer.lora_dropout["default"] = AdapterDropout(drop.p, name, layer.in_features, device).train(drop.training)


def fallback_note(model: PeftModel) -> str:
    """Return a note on adapted matrices that run PEFT's own forward despite `use_fast_layers`; "" if there are none."""
    if any(type(module) is TrainableTokensLayer for module in model.modules()):
        return "the rows of new tokens run PEFT's own forward, which copies the full embedding, not the fast one"
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
    """Return a subclass of a PEFT layer class with the same parameters, computed by `kernels.lora_linear`."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.active_adapters != ["default"]:
            out: torch.Tensor = kind.forward(self, x, *args, **kwargs)
            return out
        base, drop = self.base_layer, self.lora_dropout["default"]
        drop = drop if self.training and isinstance(drop, AdapterDropout) else None
        a, b, scale = self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]
        if type(base) is not torch.nn.Linear:
            return base(x) + lora_update(x, a, b, scale, drop)
        return lora_linear(x, base.weight, base.bias, a, b, scale, drop, self.narrow)

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "is_fast": True, "narrow": None})


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that the optimizer updates, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_file(folder: Path) -> Path:
    """Return the path of a saved adapter's weights.

    Raises:
        RecipeError: The weights are not stored as safetensors.
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
    """Attach a saved adapter to a model, from safetensors only; embedding and head grow for its new tokens.

    Args:
        base: The base model.
        folder: The adapter, in PEFT's format.
        settings: Arguments of PEFT's own `from_pretrained`.

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
    model.create_or_update_model_card = _no_card
    try:
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    finally:
        del model.create_or_update_model_card


def _no_card(folder: str) -> None:
    """Leave out PEFT's page of "More Information Needed"; `reporting.model_card` writes the card of a run."""
