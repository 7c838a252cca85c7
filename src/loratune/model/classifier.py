"""A base model with a classification head: loading it, and the modules that are trained in full.

transformers puts a fresh head on a base that was trained for something else, and PEFT trains and saves `classifier` and
`score` in full with the adapter (TaskType.SEQ_CLS). Some architectures have more modules that no file holds, such as
DistilBERT's `pre_classifier`, or a pooler that masked language models lack. Frozen, these would stay random, so they
are trained in full too.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification

from loratune.model.safetensors_headers import read_header, weight_files_of
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BY_PEFT = ("classifier", "score")
"""Endings of the names of modules that PEFT trains in full by itself with TaskType.SEQ_CLS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """The classes of a classifier and its head.

    Attributes:
        names: The names of the classes, in order.
        pad_token_id: Id of the padding token, by which decoders find an example's last token.
        head: Full names of the modules that are trained in full, including those whose weights no file holds.
        seed: Seed of the initial weights that no file holds.
    """

    names: tuple[str, ...]
    pad_token_id: int
    head: tuple[str, ...]
    seed: int


def with_classes(config: PreTrainedConfig, names: Collection[str], pad_token_id: int) -> PreTrainedConfig:
    """Return a copy of the model's configuration with these classes."""
    own = copy.deepcopy(config)
    own.id2label = dict(enumerate(names))
    own.label2id = {name: number for number, name in enumerate(names)}
    own.problem_type = "single_label_classification"
    text_config: Any = own.get_text_config()
    text_config.pad_token_id = pad_token_id
    return own


def set_padding(tokenizer: PreTrainedTokenizerBase, *, name: str) -> int:
    """Make the tokenizer pad on the right, with its end-of-text token if it has no padding token; return the id.

    Args:
        tokenizer: The base model's tokenizer, which is changed, and saved with the adapter that way.
        name: The model's name, for messages.

    Raises:
        RecipeError: The tokenizer has neither token.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RecipeError(
                f"model.name is {name}: its tokenizer has neither a padding token nor an end-of-text token",
                fix="set pad_token in the model's tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    number = tokenizer.pad_token_id
    assert isinstance(number, int)
    return number


def usable_positions(model: PreTrainedModel, positions: int | None) -> int | None:
    """Return the largest number of tokens in a text; None if the configuration does not say.

    Args:
        model: The model; may be on the meta device.
        positions: Positions according to its configuration.
    """
    # RoBERTa and its relatives count positions from after the padding token's id.
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    reserved = max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
    return None if positions is None else positions - reserved


def is_decoder(model: Any) -> bool:
    """Tell whether a classifier reads the last token of a decoder, as transformers' decoders do."""
    return isinstance(model, GenericForSequenceClassification)


def head_names(model: PreTrainedModel, stored: Collection[str]) -> tuple[str, ...]:
    """Return the full names of the modules that are trained in full.

    Args:
        model: The classifier; may be on the meta device.
        stored: Names of the tensors in the base's files; a tensor that is not among them counts as missing.
    """
    base = model.base_model
    prefix = model.base_model_prefix
    outside = [
        name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())
    ]
    pooler = getattr(base, "pooler", None)
    inside = [f"{prefix}.pooler"] if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()) else []
    return tuple(
        name
        for name in (*inside, *outside)
        if name.endswith(BY_PEFT) or not _is_stored(name, model.get_submodule(name), prefix, stored)
    )


def _is_stored(name: str, module: nn.Module, prefix: str, stored: Collection[str]) -> bool:
    names = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
    return all(full in stored or full.removeprefix(f"{prefix}.") in stored for full in names)


def stored_names(folder: Path) -> frozenset[str]:
    """Return the names of all tensors in the weight files of a folder; empty if it has none."""
    return frozenset(name for file in weight_files_of(folder) for name in read_header(file))


def load_classifier(
    source: str | Path,
    config: PreTrainedConfig,
    classes: Classes,
    *,
    revision: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Load the base with its head, from safetensors only; the head is in float32.

    Args:
        source: A folder, or a Hub id.
        config: The base's configuration.
        classes: The classes, with the seed of weights that no file holds.
        revision: The revision of a Hub model.
        dtype: Type of everything but the head.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        RecipeError: The files lack more than the head; it would stay random.
    """
    from transformers import AutoModelForSequenceClassification

    with _without_advice(), torch.random.fork_rng():
        torch.manual_seed(classes.seed)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=with_classes(config, classes.names, classes.pad_token_id),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # a head with another number of classes is replaced
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    fresh = [*loaded[1]["missing_keys"], *(name for name, *_ in loaded[1]["mismatched_keys"])]
    odd = sorted(name for name in fresh if not name.startswith(tuple(f"{module}." for module in classes.head)))
    if odd:
        raise RecipeError(
            f"the model's files lack {odd[0]}, which would be random and is not trained",
            file=source,
            fix="use a complete model",
        )
    if dtype != torch.float32:
        _keep_in_float32(model, classes.head)
    return model


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence transformers' advice to train the head, which is what happens next."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _keep_in_float32(model: nn.Module, head: Collection[str]) -> None:
    for name in head:
        module = model.get_submodule(name).float()
        module.register_forward_pre_hook(_as_float32)


def _as_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001 - torch's
    return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in args)


def classifier_notes(model: PreTrainedModel, classes: Classes, stored: Collection[str]) -> tuple[str, ...]:
    """Return notes on what a user may not expect of the head, a sentence each, without a full stop.

    Args:
        model: The classifier; may be on the meta device.
        classes: The classes and the head.
        stored: Names of the tensors in the base's files.
    """
    notes = []
    prefix = model.base_model_prefix
    more = [name for name in classes.head if not name.endswith(BY_PEFT)]
    if more:
        notes.append(
            f"no file of the model holds {', '.join(more)}: it starts from random values, is trained in full and saved "
            "with the adapter"
        )
    heads = [name for name in classes.head if name.endswith(BY_PEFT)]
    if any(_is_stored(name, model.get_submodule(name), prefix, stored) for name in heads):
        notes.append(
            f"the model has a head of its own ({', '.join(heads)}): with the same number of classes training continues "
            "from it, otherwise a new one replaces it"
        )
    return tuple(notes)
