"""A base model with a head that names classes: which of its modules are trained whole, and how it is loaded.

transformers puts a fresh head on a base that was made for something else, and PEFT trains and saves `classifier` and
`score` whole beside the adapter (TaskType.SEQ_CLS). Some architectures have more that no file holds, such as
DistilBERT's `pre_classifier` or a pooler that masked language models lack; left frozen, it would stay random, so it
is trained whole too.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification

from loratune.model.safetensors_headers import read_header, weight_files_of
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BY_PEFT = ("classifier", "score")
"""What PEFT trains whole by itself with TaskType.SEQ_CLS, wherever a module's name ends so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """What a classifier's head is made of.

    Attributes:
        names: Of the classes, in order.
        pad_token_id: What examples are padded with; decoders find an example's last token by it.
        head: Modules that are trained whole: those whose weights no file holds among them.
        seed: Of what they begin with.
    """

    names: tuple[str, ...]
    pad_token_id: int
    head: tuple[str, ...]
    seed: int


def with_classes(config: PreTrainedConfig, names: Collection[str], pad_token_id: int) -> PreTrainedConfig:
    """The model's configuration with these classes."""
    own = copy.deepcopy(config)
    own.id2label = dict(enumerate(names))
    own.label2id = {name: number for number, name in enumerate(names)}
    own.problem_type = "single_label_classification"
    text_config: Any = own.get_text_config()
    text_config.pad_token_id = pad_token_id
    return own


def set_padding(tokenizer: PreTrainedTokenizerBase, *, name: str) -> int:
    """Let the tokenizer pad at the right, with the token that ends texts where it has none of its own.

    Args:
        tokenizer: Of the base model; it is changed, and saved so with the adapter.
        name: The model's.

    Raises:
        RecipeError: There is no token to pad with.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RecipeError(
                f"model.name is {name}: its tokenizer has neither a padding token nor one that ends texts",
                fix="set pad_token in the model's tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    number = tokenizer.pad_token_id
    assert isinstance(number, int)
    return number


def usable_positions(model: PreTrainedModel, positions: int | None) -> int | None:
    """The most tokens of a text: RoBERTa and its kin count positions from after the padding token's number.

    Args:
        model: May be on the meta device.
        positions: Of its configuration.
    """
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    reserved = max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
    return None if positions is None else positions - reserved


def is_decoder(model: Any) -> bool:
    """Whether a classifier reads the last token of a decoder, in the way that transformers' decoders share."""
    return isinstance(model, GenericForSequenceClassification)


def head_names(model: PreTrainedModel, stored: Collection[str]) -> tuple[str, ...]:
    """The modules that are trained whole.

    Args:
        model: The classifier; may be on the meta device.
        stored: The names of the tensors in the base's files; names that are not known count as not there.
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
    """The names of all tensors in the files of a folder; none where there are no files."""
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
    """The base with its head, from safetensors only. What no file holds begins as `classes.seed` says, and is in
    float32.

    Args:
        source: A folder, or a hub id.
        config: Of the base.
        classes: Of the head.
        revision: Of a hub model.
        dtype: Of everything else.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        RecipeError: The files lack more than the head, which would be random and stay so.
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
            ignore_mismatched_sizes=True,  # a head of other classes is made anew
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    fresh = [*loaded[1]["missing_keys"], *(name for name, *_ in loaded[1]["mismatched_keys"])]
    odd = sorted(name for name in fresh if not name.startswith(tuple(f"{module}." for module in classes.head)))
    if odd:
        raise RecipeError(
            f"the model's files do not hold {odd[0]}, which would be random and is not trained",
            file=source,
            fix="use a complete model",
        )
    if dtype != torch.float32:
        _keep_in_float32(model, classes.head)
    return model


@contextmanager
def _without_advice() -> Iterator[None]:
    """Transformers advises to train the head, which is what will be done."""
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
    """What a user would not expect of the head, a sentence each, without a full stop.

    Args:
        model: The classifier; may be on the meta device.
        classes: Of the head.
        stored: The names of the tensors in the base's files.
    """
    notes = []
    prefix = model.base_model_prefix
    more = [name for name in classes.head if not name.endswith(BY_PEFT)]
    if more:
        notes.append(
            f"no file of the model holds {', '.join(more)}: it begins at random, and is trained whole and saved "
            "beside the adapter"
        )
    heads = [name for name in classes.head if name.endswith(BY_PEFT)]
    if any(_is_stored(name, model.get_submodule(name), prefix, stored) for name in heads):
        notes.append(
            f"the model comes with a head of its own ({', '.join(heads)}); where it has as many classes training "
            "goes on from it, "
            "else it is made anew"
        )
    return tuple(notes)
