"""New tokens: `lora.new_tokens`, each a trained row of the embedding and of the output head.

They are added to the tokenizer as ordinary tokens, not special ones: they are recognized in texts and visible in
answers. The embedding grows if it has no spare rows; many models have some. All new rows start as the mean of the
others (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html), which changes the other tokens' probabilities
least.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from tokenizers import AddedToken
from torch import nn

from loratune.model.kernels.trained_rows import embed_with_trained_rows, project_with_trained_rows
from loratune.model.patching import replace_class
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> tuple[int, ...]:
    """Add tokens to a tokenizer; return their ids, which follow the existing ones.

    Raises:
        RecipeError: One of them is already a token.
    """
    known = tokenizer.get_vocab()
    if already := [name for name in names if name in known]:
        raise RecipeError(f"lora.new_tokens: {already[0]} is already a token of this model", fix="leave it out")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert isinstance(ids, list)
    return tuple(ids)


def resize_embeddings(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Grow embedding and head to hold these tokens, and set their rows to the mean of the rows before them.

    Args:
        model: The base model, without an adapter; on the meta device it only grows.
        ids: Ids of the new tokens, ascending; without any, nothing changes.
    """
    if not ids:
        return
    embedding: Any = model.get_input_embeddings()
    if ids[-1] >= embedding.weight.shape[0]:
        with torch.random.fork_rng():
            model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in _ends(model):
            if layer.weight.device.type != "meta":
                layer.weight[list(ids)] = layer.weight[: ids[0]].float().mean(0).to(layer.weight.dtype)


def num_added_parameters(model: PreTrainedModel, ids: Sequence[int]) -> int:
    """Return the number of parameters held twice while the tables grow; 0 if they have room."""
    tables = {id(layer.weight): layer.weight for layer in _ends(model)}
    if not ids or all(ids[-1] < table.shape[0] for table in tables.values()):
        return 0
    return max(table.numel() for table in tables.values())


def unseen_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], examples: Sequence[Any]) -> tuple[str, ...]:
    """Return a warning if no training example contains one of the new tokens.

    Args:
        tokenizer: The tokenizer with the new tokens.
        ids: Ids of the new tokens.
        examples: Training examples, with `input_ids`.
    """
    unseen = [number for number in ids if not any((example.input_ids == number).any() for example in examples)]
    if not unseen:
        return ()
    names = ", ".join(str(name) for name in tokenizer.convert_ids_to_tokens(unseen))
    return (f"lora.new_tokens: {names} occurs in no training example, so the model only learns that it is unlikely",)


def _ends(model: PreTrainedModel) -> list[Any]:
    """Return the input embedding and the output head, if there are any."""
    ends: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [layer for layer in ends if layer is not None]


def resize_for_adapter(model: PreTrainedModel, adapter: Path) -> None:
    """Grow embedding and head for the new tokens of a saved adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    resize_embeddings(model, sorted(trained_numbers(config)))


def trained_numbers(config: dict[str, Any]) -> set[int]:
    """Return the ids of the tokens whose rows a saved adapter trains, from its configuration."""
    numbers: Any = config.get("trainable_token_indices") or []
    return {number for part in numbers.values() for number in part} if isinstance(numbers, dict) else set(numbers)


def use_fast_rows(model: nn.Module) -> int:
    """Make PEFT's layers of trained rows compute with `kernels.trained_rows`; return how many cannot."""
    left = 0
    for layer in model.modules():
        if type(layer) is not TrainableTokensLayer:
            continue
        if type(layer.base_layer) in (nn.Embedding, nn.Linear):
            layer.register_buffer("numbers", numbers_of(layer), persistent=False)
            replace_class(layer, FastRows)
        else:
            left += 1
    return left


def numbers_of(layer: TrainableTokensLayer) -> torch.Tensor:
    """Return the ids of the trained rows, int64 [N], on the device of the layer's weight."""
    return torch.tensor(layer.token_indices["default"], device=layer.base_layer.weight.device)


class FastRows(TrainableTokensLayer):
    """PEFT's layer with the same parameters, computed by `kernels.trained_rows`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.active_adapters != ["default"]:
            out: torch.Tensor = super().forward(x, *args, **kwargs)
            return out
        compute = embed_with_trained_rows if isinstance(self.base_layer, nn.Embedding) else project_with_trained_rows
        return compute(x, self.base_layer.weight, self.trainable_tokens_delta["default"], self.numbers)
