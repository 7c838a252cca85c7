"""Exact parameter counts, from the model's shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from loratune.errors import RecipeError
from loratune.model.targets import Matrix, matrix
from loratune.model.variants import changes_base, num_trainable
from loratune.recipe import LoraSection

BYTES_PER_ADAPTER_PARAMETER = 4  # Adapters are kept and saved in float32, whatever the dtype of the base.


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixCount:
    """One adapted matrix and the parameters that its adapter adds."""

    matrix: Matrix
    trainable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """How many parameters a run trains, and how many it keeps."""

    trainable: int
    """The adapter's parameters."""
    total: int
    """Base and adapter together, as PEFT counts. A tensor that is used twice (tied embeddings) counts once."""
    adapter_bytes: int
    """The saved adapter's weights, without the file's header of some kB."""
    per_module: tuple[MatrixCount, ...]
    """Every adapted matrix, in the order of the target names."""
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameter → its shape, of modules that are trained whole."""

    @property
    def num_whole(self) -> int:
        """The trainable parameters that are no adapter's."""
        return sum(map(math.prod, self.whole.values()))


def count_parameters(
    model: nn.Module, target_names: Sequence[str], lora: LoraSection, whole: Sequence[str] = ()
) -> ParameterCount:
    """Count what LoRA would train: r·(d_in + d_out) for every adapted matrix, and what the variant adds.

    Args:
        model: The base model, without an adapter. It may be on the meta device.
        target_names: Full module names, as `resolve_targets` returns them.
        lora: Rank and variant.
        whole: Modules of which a copy is trained whole, beside the original.
    """
    shapes = [matrix(name, model.get_submodule(name)) for name in target_names]
    per_module = tuple(MatrixCount(matrix=shape, trainable=num_trainable(lora, shape)) for shape in shapes)
    adapters = sum(item.trainable for item in per_module)
    copies = {
        f"{name}.{inner}": tuple(parameter.shape)
        for name in whole
        for inner, parameter in model.get_submodule(name).named_parameters()
    }
    num_copied = sum(map(math.prod, copies.values()))
    return ParameterCount(
        trainable=adapters + num_copied,
        total=adapters + num_copied + sum(parameter.numel() for parameter in model.parameters()),
        adapter_bytes=(adapters * (2 if changes_base(lora) else 1) + num_copied) * BYTES_PER_ADAPTER_PARAMETER,
        per_module=per_module,
        whole=copies,
    )


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False, classifier: bool = False) -> PreTrainedModel:
    """Build the model from its configuration without weights, on the meta device (tens of milliseconds).

    Args:
        config: The configuration of a causal language model.
        trust_remote_code: Whether a model class that comes with the configuration may run.
        classifier: Whether a sequence classifier is built, with as many classes as the configuration says.

    Raises:
        RecipeError: There is no such model for this configuration.
    """
    loader: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = loader.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if classifier:
            raise RecipeError(
                f"model type {config.model_type!r} cannot be built as a sequence classifier: {_first_line(error)}",
                fix="choose an encoder such as BERT or RoBERTa, or a decoder such as Llama or Qwen2",
            ) from None
        raise RecipeError(
            f"model type {config.model_type!r} cannot be built as a causal language model: {_first_line(error)}",
            fix="choose a decoder such as Llama or Qwen; a model with its own code needs trust_remote_code: true",
        ) from None
    return model


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
