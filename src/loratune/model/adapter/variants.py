"""The effects of `lora.variant`: arguments for PEFT, scale and rank of a matrix, and saving adapters of a changed base.

PiSSA (Meng et al. 2024, arXiv 2404.02948) takes A₀ and B₀ from the largest singular values of W, OLoRA (Büyükakyüz
2024, arXiv 2406.01775) from its QR decomposition. Both train B·A on W - s·B₀·A₀, so that the first step starts from W.
The saved adapter must fit the original W, since that is the base that users load it on:

    W - s·B₀·A₀ + s·B·A = W + s·[B, -B₀]·[A; A₀]

So it is saved as a plain LoRA of twice the rank with the same scale.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from loratune.model.adapter.patterns import alpha_of, highest_rank, rank_of
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from loratune.model.adapter.targets import Matrix
    from loratune.recipe.recipe import LoraSection, Recipe

PISSA_ITERATIONS = 16
"""Subspace iterations that find the largest singular values; a full SVD takes minutes per matrix of a 7 B model."""

_PEFT: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": f"pissa_niter_{PISSA_ITERATIONS}"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {},  # these two are initialized afterwards (`eva_loftq`)
    "loftq": {},
}


_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How the names of PEFT's initializations begin that change the base's weights."""


def peft_arguments(lora: LoraSection) -> dict[str, Any]:
    """Return the arguments of PEFT's `LoraConfig` for the variant and the patterns."""
    patterns: dict[str, Any] = {"rank_pattern": dict(lora.rank_pattern)} if lora.rank_pattern else {}
    if lora.alpha_pattern:
        patterns["alpha_pattern"] = {name: as_int_if_whole(alpha) for name, alpha in lora.alpha_pattern.items()}
    return {**_PEFT[lora.variant], **patterns}


def as_int_if_whole(alpha: float) -> float:
    """Return an alpha as an integer if it is one, as other programs write it."""
    return int(alpha) if math.isclose(alpha, int(alpha)) else alpha


def changes_base(lora: LoraSection) -> bool:
    """Tell whether the variant trains on changed base weights."""
    return lora.variant in ("pissa", "olora")


def has_changed_base(model: PeftModel) -> bool:
    """Tell whether attaching this adapter changed the base's weights."""
    initialization = model.peft_config["default"].init_lora_weights
    return isinstance(initialization, str) and initialization.startswith(("pissa", "olora"))


def initialization_that_changes_base(config: Mapping[str, Any]) -> str | None:
    """Return PEFT's initialization of a saved adapter if the adapter belongs to a base that it changed, else None.

    PEFT saves such an adapter as it was trained, on what the initialization left of the base. Ours are saved as plain
    adapters (`save_as_plain`), as PEFT's are with `path_initial_model_for_weight_conversion`.

    Args:
        config: The adapter's `adapter_config.json`.
    """
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGE_BASE):
        return initialization
    return "kasa" if config.get("kasa_config") else None


def scale_of(lora: LoraSection, name: str = "") -> float:
    """Return the factor of B·A·x: alpha/r, or alpha/√r with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).

    Args:
        lora: The recipe's section.
        name: Full name of the matrix; empty for one that no pattern matches.
    """
    r, alpha = rank_of(lora, name), alpha_of(lora, name)
    return alpha / math.sqrt(r) if lora.variant == "rslora" else alpha / r


def scale_in_words(lora: LoraSection) -> str:
    """Return the formula that `scale_of` computes."""
    return "alpha/√r" if lora.variant == "rslora" else "alpha/r"


def saved_rank(lora: LoraSection) -> int:
    """Return the highest rank of the saved adapter: twice the trained one if the variant changes the base."""
    return (2 if changes_base(lora) else 1) * highest_rank(lora)


def num_trainable(lora: LoraSection, matrix: Matrix) -> int:
    """Return the trained parameters of a matrix: count · r·(d_in + d_out), and d_out magnitudes with DoRA."""
    magnitudes = matrix.d_out if lora.variant == "dora" else 0
    return rank_of(lora, matrix.name) * matrix.count * (matrix.d_in + matrix.d_out) + magnitudes


def check_variant(lora: LoraSection, matrices: Sequence[Matrix], model: torch.nn.Module) -> None:
    """Refuse matrices that a variant cannot be applied to.

    Raises:
        RecipeError: The rank exceeds that of a matrix that A and B are taken from, or OLoRA is to adapt GPT-2's layers.
    """
    if not changes_base(lora) and lora.variant not in ("eva", "loftq"):
        return
    for matrix in sorted(matrices, key=lambda matrix: min(matrix.d_in, matrix.d_out)):
        most, r = min(matrix.d_in, matrix.d_out), rank_of(lora, matrix.name)
        if r > most:
            raise RecipeError(
                f"lora.variant is {lora.variant}, which takes A or B from the matrix or its inputs; {matrix.name} has "
                f"at most rank {most}, but {'lora.r' if r == lora.r else 'its rank by lora.rank_pattern'} is {r}",
                fix=f"{most} or less, or another variant",
            )
    if lora.variant == "olora" and isinstance(model.get_submodule(matrices[0].name), Conv1D):
        raise RecipeError(
            "lora.variant is olora, which PEFT does not support on the transposed matrices of this architecture",
            fix="lora.variant=pissa",
        )


def check_ranks(lora: LoraSection, matrices: Sequence[Matrix]) -> None:
    """Refuse ranks that must be a typing error.

    Raises:
        RecipeError: A rank is more than ten times both sides of its matrix.
    """
    # B·A cannot have a higher rank than the matrix; up to ten times is only a note (`rank_notes`).
    for matrix in matrices:
        r = rank_of(lora, matrix.name)
        if r > 10 * max(matrix.d_in, matrix.d_out):
            raise RecipeError(
                f"{'lora.r' if r == lora.r else 'lora.rank_pattern'} is {r:,}, far more than both sides of "
                f"{matrix.name}, which is {matrix.d_out:,} × {matrix.d_in:,}",
                fix=f"{min(matrix.d_in, matrix.d_out):,} or less: the rank of B·A cannot exceed the shorter side; "
                "8 to 64 are usual",
            )


def rank_notes(lora: LoraSection, matrices: Sequence[Matrix]) -> tuple[str, ...]:
    """Return a note if ranks exceed those that their matrices can have, a sentence without a full stop."""
    above = [matrix for matrix in matrices if rank_of(lora, matrix.name) > min(matrix.d_in, matrix.d_out)]
    if not above:
        return ()
    first = min(above, key=lambda matrix: min(matrix.d_in, matrix.d_out))
    return (
        f"the recipe's rank exceeds the shorter side of {len(above)} adapted matrices, such as {first.name} "
        f"({first.d_out:,} × {first.d_in:,}) with {rank_of(lora, first.name):,}: the excess parameters add nothing",
    )


def variant_notes(recipe: Recipe) -> tuple[str, ...]:
    """Return notes on what a user may not expect of the variant, a sentence each, without a full stop."""
    if recipe.lora.variant == "dora" and recipe.train.engine == "fast":
        return (
            "lora.variant is dora: the adapted matrices run PEFT's own forward, which computes their full update B·A "
            "in every step, not the fast one",
        )
    if recipe.lora.variant == "eva":
        return (
            "lora.variant is eva: before the first step, training data runs forward until the directions of A converge",
        )
    if changes_base(recipe.lora):
        return (
            f"lora.variant is {recipe.lora.variant}: the adapter is saved as a plain one of rank "
            f"{saved_rank(recipe.lora)} and evaluated on the original base",
        )
    return ()


# ---- variants that change the base


def keep_initial_values(model: PeftModel) -> None:
    """Keep A₀ and B₀ in the model, as buffers that are not saved."""
    for layer in _lora_layers(model):
        layer.register_buffer("initial_a", layer.lora_A["default"].weight.detach().clone(), persistent=False)
        layer.register_buffer("initial_b", layer.lora_B["default"].weight.detach().clone(), persistent=False)


def save_as_plain(model: PeftModel, folder: Path) -> None:
    """Write the adapter as a plain LoRA of twice the rank that fits the original base.

    Args:
        model: The trained model, with the values that `keep_initial_values` kept.
        folder: The folder to create.
    """
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for part, initial, dim in (("lora_A", layer.initial_a, 0), ("lora_B", -layer.initial_b, 1)):
            key = f"{name}.{part}.weight"
            tensors[key] = torch.cat([tensors[key], initial], dim=dim)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: a tied head is saved twice, as PEFT does, and safetensors refuses shared memory.
    separate = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    save_file(separate, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plain_config(model.peft_config["default"]).save_pretrained(str(folder))


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the configuration of the adapter that `save_as_plain` writes."""
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    plain.r, plain.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    plain.rank_pattern = {name: 2 * r for name, r in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {name: 2 * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    plain.inference_mode = True
    return plain


def _lora_layers(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
