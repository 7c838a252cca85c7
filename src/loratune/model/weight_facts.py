"""What the weights themselves say, whatever config.json says.

Their type, an output head that differs from the embedding, and values that are not finite.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from loratune.model.safetensors_headers import read_header, stored_name, stored_type, weight_files_of
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn

_HEADS = (
    *("lm_head", "embed_out", "proj_out", "output_projection", "head", "output", "lm_loss", "generator_lm_head"),
    *("decoder", "pred_layer.proj"),
)
"""Last parts of the names under which transformers' causal language models store an output head that may be tied."""

_ROWS_AT_A_TIME = 4096


def correct_tied(config: Any, folder: Path) -> None:
    """Set a configuration's `tie_word_embeddings` to False if the files hold a head that differs from the embedding.

    transformers keeps such a head when it loads the model, but ties it again where it resizes embeddings, and what
    reads config.json takes the two for one matrix.

    Args:
        config: transformers' configuration of the model; it is changed in place.
        folder: The model's folder; without weights in it, nothing changes.
    """
    if config.get_text_config().tie_word_embeddings and has_own_head(folder):
        untie(config)


def correct_dtype(config: Any, folder: Path) -> None:
    """Set a configuration's `dtype` to the type that most of the files' parameters have; packed ones leave it."""
    if (name := stored_type(folder)) is not None:
        config.dtype = getattr(torch, name)


def correct_tied_as_loaded(model: Any) -> None:
    """Do as `correct_tied`, for a model that has just been loaded."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if None not in (embedding, head) and embedding.weight is not head.weight:
        untie(model.config)


def untie(config: Any) -> None:
    """Set `tie_word_embeddings` of a configuration and of its text part to False."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def has_own_head(folder: Path) -> bool:
    """Tell whether a model's files hold an output head that differs from the input embedding.

    Reads both matrices, up to the first block of rows that differs.
    """
    found = {name: (file, shape) for file in weight_files_of(folder) for name, shape in read_header(file).items()}
    for head, (file, shape) in found.items():
        if not _is_part(head, _HEADS) or len(shape) != 2:
            continue
        embeddings = [name for name in found if name != head and _is_embedding(name) and found[name][1] == shape]
        if embeddings:
            return not any(_are_equal((file, head), (found[name][0], name)) for name in embeddings)
    return False


def _are_equal(one: tuple[Path, str], other: tuple[Path, str]) -> bool:
    """Compare two matrices of the same shape, each given by its file and name."""
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(safe_open(file, framework="pt")).get_slice(name) for file, name in (one, other)
        )
        starts = range(0, first.get_shape()[0], _ROWS_AT_A_TIME)
        return all(
            torch.equal(first[start : start + _ROWS_AT_A_TIME], second[start : start + _ROWS_AT_A_TIME])
            for start in starts
        )


def _is_part(name: str, leaves: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{leaf}.weight") for leaf in leaves)


def _is_embedding(name: str) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return "embed" in module or module in ("wte", "w", "shared")


def is_end_of_model(name: str) -> bool:
    """Tell by a weight's name whether it is that of the input embedding or of the output head."""
    outside = not any(part.isdigit() for part in name.split("."))  # of the layers
    return outside and (_is_part(name, _HEADS) or (_is_embedding(name) and "position" not in name))


def check_finite(model: nn.Module, folder: Path) -> None:
    """Check that no weight of a loaded model is NaN or infinite.

    Reads each weight once, without a copy.

    Args:
        model: The model, in the type that it computes in.
        folder: The folder with its files, which tell a damaged weight from one that is too large for the type.

    Raises:
        RecipeError: A weight is not; by its name.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            continue
        if type(parameter.detach()) is not torch.Tensor:  # packed by torchao, which shows another type than it holds
            continue
        if parameter.numel() == 0 or _is_finite(parameter.detach()):
            continue
        dtype = str(parameter.dtype).removeprefix("torch.")
        if dtype != "float32" and (largest := _largest_stored(folder, name)) is not None and math.isfinite(largest):
            raise RecipeError(
                f"the base's weight {name} overflows in {dtype}: its largest value is {largest:.3g}",
                file=folder,
                fix="model.dtype=float32, or bfloat16 if the device has it",
            )
        raise RecipeError(
            f"the base has weights that are NaN or infinite, the first in {name}",
            file=folder,
            fix="download the model again, or choose another; no setting of the recipe can repair it",
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # NaN anywhere makes both NaN
    return bool(low.isfinite() & high.isfinite())


def _largest_stored(folder: Path, name: str) -> float | None:
    """Return the largest magnitude of a weight in the files; None if they store it under an unknown name."""
    for file in weight_files_of(folder):
        found = stored_name(name, read_header(file))
        if found is not None:
            with safe_open(file, framework="pt") as opened:
                return float(opened.get_tensor(found).abs().max())
    return None


def first_not_finite(file: Path) -> str | None:
    """Return the name of the first tensor of a safetensors file that holds NaN or infinity; None if all are finite."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor.float()):
                return str(name)
    return None
