"""What `lora.variant` changes: what PEFT is told, which scale and rank a matrix gets, and how a base that is changed at the
beginning is undone at the end.

PiSSA (Meng et al. 2024, arXiv 2404.02948) takes A₀ and B₀ from the largest singular values of W, OLoRA (Büyükakyüz 2024,
arXiv 2406.01775) from its QR decomposition. Both train B·A on W - s·B₀·A₀, so that the first step starts from W. What is
saved must fit W itself, which is what everybody else has:

    W - s·B₀·A₀ + s·B·A = W + s·[B, -B₀]·[A; A₀]

a plain LoRA of twice the rank, with the same scale.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from loratune.model.adapter.patterns import alpha_of, highest_rank, rank_of
from loratune.model.adapter.targets import Matrix
from loratune.recipe.recipe import LoraSection, Recipe
from loratune.run.errors import RecipeError

PISSA_ITERATIONS = 16
"""Of the subspace iteration that finds the largest singular values; a whole decomposition takes minutes a matrix at 7 B."""

_PEFT: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": f"pissa_niter_{PISSA_ITERATIONS}"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {},  # these two get their beginning afterwards (`first_values`)
    "loftq": {},
}


def peft_arguments(lora: LoraSection) -> dict[str, Any]:
    """The arguments of PEFT's `LoraConfig` that the variant adds, and the patterns."""
    patterns: dict[str, Any] = {"rank_pattern": dict(lora.rank_pattern)} if lora.rank_pattern else {}
    if lora.alpha_pattern:
        patterns["alpha_pattern"] = {name: whole(alpha) for name, alpha in lora.alpha_pattern.items()}
    return {**_PEFT[lora.variant], **patterns}


def whole(alpha: float) -> float:
    """An alpha as others write it: an integer where it is one."""
    return int(alpha) if math.isclose(alpha, int(alpha)) else alpha


def changes_base(lora: LoraSection) -> bool:
    """Whether the base's weights are others while it trains."""
    return lora.variant in ("pissa", "olora")


def has_changed_base(model: PeftModel) -> bool:
    """Whether the base under this adapter is no longer the one that was loaded."""
    beginning = model.peft_config["default"].init_lora_weights
    return isinstance(beginning, str) and beginning.startswith(("pissa", "olora"))


def scale_of(lora: LoraSection, name: str = "") -> float:
    """What B·A·x is multiplied by: alpha/r, or alpha/√r with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).

    Args:
        lora: Of the recipe.
        name: Of the matrix; none for one that no pattern matches.
    """
    r, alpha = rank_of(lora, name), alpha_of(lora, name)
    return alpha / math.sqrt(r) if lora.variant == "rslora" else alpha / r


def scale_in_words(lora: LoraSection) -> str:
    """The formula of `scale_of`."""
    return "alpha/√r" if lora.variant == "rslora" else "alpha/r"


def saved_rank(lora: LoraSection) -> int:
    """The highest rank of the saved adapter, which servers are told: twice the trained one where the base was changed."""
    return (2 if changes_base(lora) else 1) * highest_rank(lora)


def num_trainable(lora: LoraSection, matrix: Matrix) -> int:
    """The parameters that a matrix of d_out × d_in gets: r·(d_in + d_out), and with DoRA a magnitude for each output; a stack as
    many times."""
    magnitudes = matrix.d_out if lora.variant == "dora" else 0
    return rank_of(lora, matrix.name) * matrix.count * (matrix.d_in + matrix.d_out) + magnitudes


def check_variant(lora: LoraSection, matrices: Sequence[Matrix], model: torch.nn.Module) -> None:
    """Refuse what a variant cannot do on these matrices.

    Raises:
        RecipeError: The rank is larger than a matrix that A and B are taken from, or OLoRA meets GPT-2's layers.
    """
    if not changes_base(lora) and lora.variant not in ("eva", "loftq"):
        return
    for matrix in sorted(matrices, key=lambda matrix: min(matrix.d_in, matrix.d_out)):
        most, r = min(matrix.d_in, matrix.d_out), rank_of(lora, matrix.name)
        if r > most:
            raise RecipeError(
                f"lora.variant is {lora.variant}, which takes A or B from the matrix or its inputs, and {matrix.name} has no rank "
                f"over {most}, but {'lora.r' if r == lora.r else 'its rank by lora.rank_pattern'} is {r}",
                fix=f"{most} or less, or another variant",
            )
    if lora.variant == "olora" and isinstance(model.get_submodule(matrices[0].name), Conv1D):
        raise RecipeError(
            "lora.variant is olora, which PEFT does not do on the transposed matrices of this architecture",
            fix="lora.variant=pissa",
        )


def check_ranks(lora: LoraSection, matrices: Sequence[Matrix]) -> None:
    """Refuse ranks that no adapter can use: B·A has no higher rank than the matrix, and from ten times that on it is a slip.

    Raises:
        RecipeError: A rank is over ten times as high as both sides of its matrix.
    """
    for matrix in matrices:
        r = rank_of(lora, matrix.name)
        if r > 10 * max(matrix.d_in, matrix.d_out):
            raise RecipeError(
                f"{'lora.r' if r == lora.r else 'lora.rank_pattern'} is {r:,}, far more than both sides of {matrix.name}, which has "
                f"{matrix.d_out:,} × {matrix.d_in:,}",
                fix=f"{min(matrix.d_in, matrix.d_out):,} or less: B·A has no rank above the shorter side; 8 to 64 are usual",
            )


def rank_notes(lora: LoraSection, matrices: Sequence[Matrix]) -> tuple[str, ...]:
    """That ranks are higher than their matrices can have, a sentence without a full stop."""
    above = [matrix for matrix in matrices if rank_of(lora, matrix.name) > min(matrix.d_in, matrix.d_out)]
    if not above:
        return ()
    first = min(above, key=lambda matrix: min(matrix.d_in, matrix.d_out))
    return (
        f"{len(above)} adapted matrices have a higher rank by the recipe than they can have, such as {first.name} "
        f"({first.d_out:,} × {first.d_in:,}) with {rank_of(lora, first.name):,}: parameters that add nothing",
    )


def variant_notes(recipe: Recipe) -> tuple[str, ...]:
    """What a user would not expect of the variant, a sentence each, without a full stop."""
    if recipe.lora.variant == "dora" and recipe.train.engine == "fast":
        return (
            "lora.variant is dora: the adapted matrices run PEFT's own forward, which makes their whole update at every "
            "step, not the fast one",
        )
    if recipe.lora.variant == "eva":
        return (
            "lora.variant is eva: before the first step the training data is run forward until the directions of A stand still",
        )
    if changes_base(recipe.lora):
        return (
            f"lora.variant is {recipe.lora.variant}: the adapter is saved as a plain one of rank {saved_rank(recipe.lora)}, "
            "and evaluated on the base as it was",
        )
    return ()


# ---- a base that is changed at the beginning


def keep_beginning(model: PeftModel) -> None:
    """Keep A₀ and B₀ beside A and B, as buffers that no checkpoint and no adapter file has."""
    for layer in _lora_layers(model):
        layer.register_buffer("initial_a", layer.lora_A["default"].weight.detach().clone(), persistent=False)
        layer.register_buffer("initial_b", layer.lora_B["default"].weight.detach().clone(), persistent=False)


def save_as_plain(model: PeftModel, folder: Path) -> None:
    """Write the adapter as a plain LoRA of twice the rank that fits the untouched base.

    Args:
        model: After `keep_beginning` and training.
        folder: To make.
    """
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for part, initial, dim in (("lora_A", layer.initial_a, 0), ("lora_B", -layer.initial_b, 1)):
            key = f"{name}.{part}.weight"
            tensors[key] = torch.cat([tensors[key], initial], dim=dim)
    folder.mkdir(parents=True, exist_ok=True)
    apart = {
        name: tensor.detach().clone() for name, tensor in tensors.items()
    }  # a tied head is saved twice, as by PEFT
    save_file(apart, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plain_config(model.peft_config["default"]).save_pretrained(str(folder))


def plain_config(config: LoraConfig) -> LoraConfig:
    """The configuration of the adapter that `save_as_plain` writes."""
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    plain.r, plain.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    plain.rank_pattern = {name: 2 * r for name, r in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {name: 2 * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    plain.inference_mode = True
    return plain


def _lora_layers(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
