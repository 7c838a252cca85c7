"""Exact parameter counts, from the model's shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from loratune.model.adapter.modules_to_save import (
    FullyTrained,
    fully_trained_in_words,
    fully_trained_modules,
    head_modules,
)
from loratune.model.adapter.target_parameters import resolve_target_parameters, target_parameters_in_words
from loratune.model.adapter.targets import Matrix, describe_targets, matrix
from loratune.model.adapter.variants import changes_base, num_trainable
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.recipe.recipe import LoraSection

BYTES_PER_ADAPTER_PARAMETER = 4
"""Adapters are kept and saved in float32, whatever the type of the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixCount:
    """An adapted matrix, and the number of parameters that its adapter adds."""

    matrix: Matrix
    trainable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """How many parameters a run trains, and how many there are.

    Attributes:
        trainable: Parameters of the adapter and of modules trained in full.
        total: Parameters of base and adapter together, as PEFT counts. A tensor that is used twice (tied embeddings)
            counts once.
        adapter_bytes: Bytes of the saved adapter's weights, without the file's header of a few kB.
        per_module: Every adapted matrix, in the order of the target names, and then every stack of matrices.
        whole: Modules trained in full.
        num_stacks: How many of `per_module` are stacks, named by `lora.target_parameters`.
        outside: Parameters outside of the layers: of the input embedding, and of an output head that is not tied to it.
    """

    trainable: int
    total: int
    adapter_bytes: int
    per_module: tuple[MatrixCount, ...]
    whole: tuple[FullyTrained, ...] = ()
    num_stacks: int = 0
    outside: int = 0

    @property
    def matrices(self) -> list[Matrix]:
        """The shapes of everything that is adapted."""
        return [item.matrix for item in self.per_module]

    @property
    def target_matrices(self) -> list[Matrix]:
        """The shapes of the adapted matrices of `lora.targets`."""
        return self.matrices[: len(self.per_module) - self.num_stacks]

    @property
    def stacks(self) -> list[Matrix]:
        """The shapes of the adapted stacks of `lora.target_parameters`."""
        return self.matrices[len(self.per_module) - self.num_stacks :]

    @property
    def in_adapter(self) -> int:
        """The number of the adapter's parameters."""
        return sum(item.trainable for item in self.per_module)

    @property
    def whole_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all tensors trained in full."""
        return tuple(shape for item in self.whole for shape in item.shapes)


def count_parameters(
    model: nn.Module, target_names: Sequence[str], lora: LoraSection, head: Sequence[str] = ()
) -> ParameterCount:
    """Count what LoRA would train: r·(d_in + d_out) for every adapted matrix, and what the variant adds.

    Args:
        model: The base model, without an adapter. It may be on the meta device.
        target_names: Full module names, as `resolve_targets` returns them.
        lora: Ranks, variant, and the modules trained in full.
        head: Modules of a classifier's head, which are trained in full too.

    Raises:
        RecipeError: A module to be trained in full is missing, or adapted as well.
    """
    shapes = [matrix(name, model.get_submodule(name)) for name in target_names]
    shapes += resolve_target_parameters(model, lora, target_names)
    per_module = tuple(MatrixCount(matrix=shape, trainable=num_trainable(lora, shape)) for shape in shapes)
    whole = (*fully_trained_modules(model, lora, target_names), *head_modules(model, head, target_names))
    in_adapter = sum(item.trainable for item in per_module)
    trainable = in_adapter + sum(item.trainable for item in whole)
    saved = in_adapter * (2 if changes_base(lora) else 1) + sum(item.num_saved for item in whole)
    return ParameterCount(
        trainable=trainable,
        total=trainable + sum(parameter.numel() for parameter in model.parameters()),
        adapter_bytes=saved * BYTES_PER_ADAPTER_PARAMETER,
        per_module=per_module,
        whole=whole,
        num_stacks=len(shapes) - len(target_names),
        outside=_num_outside(model),
    )


def _num_outside(model: nn.Module) -> int:
    if not isinstance(model, PreTrainedModel):
        return 0
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    weights = {id(layer.weight): layer.weight.numel() for layer in ends if layer is not None}  # tied: one
    return sum(weights.values())


def trained_in_words(model: nn.Module, lora: LoraSection, count: ParameterCount) -> str:
    """Describe what is trained for people: `q_proj, v_proj in 28 layers; whole: norm`."""
    words = [describe_targets(model, lora.targets, lora.layers)]
    words += [target_parameters_in_words(count.stacks)] if count.stacks else []
    words += [f"whole: {fully_trained_in_words(count.whole)}"] if count.whole else []
    return "; ".join(words)


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False, classifier: bool = False) -> PreTrainedModel:
    """Build the model from its configuration without weights, on the meta device (tens of milliseconds).

    Args:
        config: The configuration of a causal language model.
        trust_remote_code: Whether a model class that comes with the model's files may run.
        classifier: Whether to build a sequence classifier, with as many classes as the configuration says.

    Raises:
        RecipeError: transformers has no such model for this configuration.
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
