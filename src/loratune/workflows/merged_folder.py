"""Write base and adapter as one folder of safetensors."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from loratune.exporting.certificate import EXACT, QUANTIZED, ROUNDED, Target, Tolerance, Written
from loratune.exporting.gguf.model import is_quantized
from loratune.exporting.load_back import TransformersReader
from loratune.exporting.merge_weights import DTYPES, MergedWeights, Values, copy_companions, write_merged
from loratune.exporting.older_config import add_older_names
from loratune.exporting.structure import config_differences
from loratune.exporting.weights_proof import for_all, prove_weights
from loratune.exporting.written_tensors import FolderTensors, rounding_to
from loratune.model.adapter.attach import load_adapter
from loratune.model.device import torch_dtype
from loratune.model.load import gguf_file, is_packed, load_model
from loratune.model.quantization.checkpoint import method_of, rounds_inputs
from loratune.model.quantization.kinds import PACKED
from loratune.model.quantization.quantize import as_multiplied, quantized_matrices, unpack_layers
from loratune.planning.parameters import skeleton

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.exporting.reference_outputs import ReferenceOutputs
    from loratune.planning.preparation import Preparation
    from loratune.run.directory import Record
    from loratune.workflows.finished import FinishedRun


TRAINED_BASE = "base"
"""The folder, beside an adapter for a quantized base, with the base's values in training."""


def merged_dtype(prepared: Preparation, dtype: str) -> torch.dtype | None:
    """Return the type to write a merged model in; None keeps that of each tensor in the base's files.

    Args:
        prepared: The run's inputs.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: as in the base's files, and bfloat16 where the base is a
            quantized GGUF file.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    source = gguf_file(prepared.recipe.model)
    return torch.bfloat16 if source is not None and is_quantized(source) else None


def merged_bytes(finished: FinishedRun, dtype: str) -> int:
    """Estimate the size of a merged folder's weights, in bytes."""
    if method_of(finished.config) is None:
        return finished.base_bytes
    wanted = merged_dtype(finished.prepared, dtype) or torch_dtype(finished.prepared.recipe.model.dtype)
    return finished.prepared.adapter.parameters.total * wanted.itemsize


def write_merged_folder(finished: FinishedRun, folder: Path, dtype: str) -> Written:
    """Write a merged folder; return how to prove it."""
    recipe = finished.prepared.recipe
    wanted = merged_dtype(finished.prepared, dtype)
    method = method_of(finished.config)
    finished.progress.line(
        f"merging {len(finished.updates)} matrices in float32, written in {wanted or 'the type of the base'}"
    )
    frozen = trained_values(finished)
    if frozen:
        finished.progress.line(
            f"{len(frozen)} matrices of the base are written with their values in {recipe.model.quantization}, "
            "on which the adapter was trained"
        )
    if method is not None:
        wanted = wanted or torch_dtype(recipe.model.dtype)
        finished.progress.line(
            f"the base's files are quantized ({method}); all weights are written unpacked, with the values of training"
        )
    if _needs_peft(finished):
        _merge_with_peft(finished, folder, wanted)
    else:
        write_merged(finished.base, finished.updates, folder, dtype=wanted, frozen=frozen, replaced=finished.replaced)
    add_older_names(folder)
    copy_companions(finished.base, finished.run.adapter, folder, finished.stops)

    return read_merged_folder(finished, folder)


def write_trained_base(finished: FinishedRun, folder: Path) -> None:
    """Write the base of a run on a quantized one, with the values that training multiplied with, in the run's type."""
    section = finished.prepared.recipe.model
    finished.progress.line(
        f"the adapter was trained on a base in {section.quantization}: the base's values in training are written, in "
        f"{section.dtype}"
    )
    folder.mkdir()
    write_merged(finished.base, {}, folder, dtype=torch_dtype(section.dtype), frozen=trained_values(finished))
    add_older_names(folder)
    copy_companions(finished.base, finished.run.adapter, folder, finished.stops)


def is_packed_run(finished: FinishedRun) -> bool:
    """Return whether the base was quantized for training, so that no file of anybody has its values."""
    return finished.prepared.recipe.model.quantization in PACKED


@contextmanager
def base_of_training(finished: FinishedRun, beside: Path) -> Iterator[Path]:
    """Yield a folder with the base's values in training.

    Args:
        finished: The run.
        beside: Where they were written with the export; if they were not, and no file has them, a temporary folder is.
    """
    if beside.is_dir() or not is_packed_run(finished):
        yield beside if beside.is_dir() else finished.base
        return
    with TemporaryDirectory() as folder:
        write_trained_base(finished, Path(folder) / TRAINED_BASE)
        yield Path(folder) / TRAINED_BASE


def prove_trained_base(finished: FinishedRun, folder: Path) -> Record | None:
    """Compare a folder of `write_trained_base` with the base's values in training."""
    tied = bool(finished.config.get_text_config().tie_word_embeddings)
    weights = MergedWeights(finished.base, {}, trained_values(finished))
    with weights, FolderTensors(folder, tied=tied) as written:
        return prove_weights(weights, written, base_name=finished.prepared.recipe.model.name)


def read_merged_folder(finished: FinishedRun, folder: Path) -> Written:
    """Return how to prove that a folder holds base and adapter of a run, merged."""
    recipe = finished.prepared.recipe
    trust = recipe.model.trust_remote_code
    tied = bool(finished.config.get_text_config().tie_word_embeddings)
    with FolderTensors(folder, tied=tied) as tensors:
        dtype = tensors.dtype

    def load(_: ReferenceOutputs) -> Target:
        return TransformersReader(folder, dtype="auto", device=recipe.train.device, trust_remote_code=trust)

    def prove() -> Record | None:
        if _needs_peft(finished):  # whose tensors only transformers can name or unpack
            return None
        weights = MergedWeights(finished.base, finished.updates, trained_values(finished), finished.replaced)
        with weights, FolderTensors(folder, tied=tied) as written:
            return prove_weights(weights, written, base_name=recipe.model.name)

    def settings() -> list[str]:
        return config_differences(finished.config, AutoConfig.from_pretrained(folder, trust_remote_code=trust))

    return Written(
        load=load,
        tolerance=merged_tolerance(finished),
        rounding=None if dtype is None else for_all(rounding_to(dtype)),
        rounding_known=dtype is not None,
        prove=prove,
        settings=settings,
        way_out=f"loratune merge {finished.run.root} OUT --dtype float32, or export the adapter alone",
    )


def _needs_peft(finished: FinishedRun) -> bool:
    """Return whether the base's files cannot be merged into tensor by tensor."""
    return method_of(finished.config) is not None or bool(finished.prepared.adapter.parameters.stacks)


def merged_tolerance(finished: FinishedRun) -> Tolerance:
    """Return how far arithmetic alone may move a merged model from training."""
    recipe = finished.prepared.recipe
    if not is_packed(finished.config, recipe.model):
        return EXACT
    # Training also rounded the inputs of products to 8 bits, which the merged model does not.
    if recipe.model.quantization == "int8" or rounds_inputs(finished.config):
        return QUANTIZED
    return EXACT if recipe.model.dtype == "float32" else ROUNDED


def _merge_with_peft(finished: FinishedRun, folder: Path, dtype: torch.dtype | None) -> None:
    """Merge with PEFT, with the full model in memory in float32, and write it with transformers.

    Needed for stacked experts, whose names in an architecture's files only transformers knows.
    """
    recipe = finished.prepared.recipe
    comes_quantized = method_of(finished.config) is not None
    # A quantized checkpoint is unpacked to the type of training first, so that its values are those of training.
    loaded_as = torch_dtype(recipe.model.dtype) if comes_quantized else torch.float32
    base: Any = load_model(finished.prepared.model.base, recipe.model, dtype=loaded_as, device="cpu")
    if comes_quantized:
        unpack_layers(base)
        base.float()
    merged: Any = load_adapter(base, finished.run.adapter).merge_and_unload()
    merged.to(dtype or finished.config.dtype or torch.float32).save_pretrained(folder)


def trained_values(finished: FinishedRun) -> dict[str, Values]:
    """Return the matrices that training multiplied with in place of the base's; none where they were not quantized."""
    section = finished.prepared.recipe.model
    if section.quantization not in PACKED:
        return {}
    model = skeleton(finished.config, trust_remote_code=section.trust_remote_code)
    values = partial(as_multiplied, quantization=section.quantization, dtype=torch_dtype(section.dtype))
    return {name: values for name, _ in quantized_matrices(model)}
