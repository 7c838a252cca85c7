"""Decodes a batch of prompts: what prompts have in common is computed once, and answers that ended leave the batch.

transformers' `generate` does the decoding, `CHUNK` tokens at a time, on a key/value cache that is kept between its
calls. Used by `evaluation.generate`; `workflows.serving` decodes single answers in turns.
"""

from __future__ import annotations

import inspect
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK = 8
"""Tokens that are decoded before answers that ended leave the batch."""

LEAST_PREFIX = 16
"""Tokens that all prompts of a batch must have in common to be computed once."""


def decode(model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> list[list[int]]:
    """Return the new tokens of every prompt; what follows a stop token is arbitrary.

    Args:
        model: The model, in evaluation mode.
        prompts: The tokens of each prompt; a prompt that occurs several times is read once.
        settings: Settings of `generate`, with `max_new_tokens`, `eos_token_id` and `pad_token_id`.
    """
    prefix = _common_prefix(prompts) if _positions_are_free(model) else 0
    ids, mask = _padded(prompts, prefix, settings.pad_token_id, model.device)
    if not _continues(model):
        rows: list[list[int]] = _generate(model, ids, mask, None, settings)[:, ids.shape[1] :].tolist()
        return rows
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if _positions_are_free(model):
        _read_common_tokens(model, cache, ids, mask, prompts, prefix)
    stops = set(settings.eos_token_id or ())
    answers: list[list[int]] = [[] for _ in prompts]
    active, left = list(range(len(prompts))), settings.max_new_tokens
    while active and left:
        settings = copy(settings)
        settings.max_new_tokens = min(CHUNK, left)
        output = _generate(model, ids, mask, cache, settings)
        new = output[:, ids.shape[1] :].tolist()
        for index, tokens in zip(active, new, strict=True):
            answers[index] += tokens
        going = [row for row, tokens in enumerate(new) if stops.isdisjoint(tokens)]
        if len(going) < len(active):
            active, output, mask = [active[row] for row in going], output[going], mask[going]
            cache.batch_select_indices(torch.tensor(going, dtype=torch.long, device=ids.device))
        added = output.shape[1] - ids.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(going), added)], dim=1)
        left, ids = left - added, output
    return answers


class Continuation:
    """One answer, decoded a few tokens at a time, so that others can be decoded in between.

    Args:
        model: The model, in evaluation mode. Its weights must be the same at each call of `advance`.
        prompt: The tokens of the prompt.
        settings: Settings of `generate`, with `max_new_tokens`, `eos_token_id` and `pad_token_id`.
    """

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int], settings: GenerationConfig) -> None:
        self._model, self._settings = model, settings
        self._ids = torch.tensor([list(prompt)], device=model.device)
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True)) if _continues(model) else None
        self.left: int = settings.max_new_tokens
        """The number of tokens that may follow; 0 after a stop token."""

    def advance(self, count: int) -> list[int]:
        """Return the next tokens, at most `count`; all of them if the model's cache cannot be kept between calls."""
        settings = copy(self._settings)
        settings.max_new_tokens = self.left if self._cache is None else min(count, self.left)
        output = _generate(self._model, self._ids, torch.ones_like(self._ids), self._cache, settings)
        new: list[int] = output[0, self._ids.shape[1] :].tolist()
        stopped = not set(settings.eos_token_id or ()).isdisjoint(new)
        self._ids, self.left = output, 0 if stopped else self.left - len(new)
        return new


def _continues(model: PreTrainedModel) -> bool:
    """Return whether the model's cache holds keys and values alone, so that rows can be taken out of it."""
    layers = _cache_layers(model)
    return bool(layers) and layers <= {DynamicLayer, DynamicSlidingWindowLayer}


def _positions_are_free(model: PreTrainedModel) -> bool:
    """Return whether padding may stand between tokens: every layer sees all positions, which are given as numbers."""
    return _cache_layers(model) == {DynamicLayer} and "position_ids" in inspect.signature(model.forward).parameters


def _cache_layers(model: PreTrainedModel) -> set[type]:
    """Return the kinds of layers of the model's key/value cache; none if it has a cache of its own."""
    if not model._supports_default_dynamic_cache():  # type: ignore[operator]
        return set()
    return {type(layer) for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers}


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; 0 if these are too few, and never all of a prompt."""
    first, last = min(prompts, key=tuple), max(prompts, key=tuple)
    shortest = min(map(len, prompts)) - 1
    equal = next((index for index in range(shortest) if first[index] != last[index]), shortest)
    return equal if len(prompts) > 1 and equal >= LEAST_PREFIX else 0


def _padded(
    prompts: Sequence[Sequence[int]], prefix: int, padding: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and attention mask [N, W], padded between the first `prefix` tokens and the others."""
    width = max(map(len, prompts))
    ids = [[*p[:prefix], *[padding] * (width - len(p)), *p[prefix:]] for p in prompts]
    mask = [[1] * prefix + [0] * (width - len(p)) + [1] * (len(p) - prefix) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _read_common_tokens(
    model: PreTrainedModel,
    cache: DynamicCache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    prefix: int,
) -> None:
    """Fill the cache, for every prompt, with the common prefix and with what prompts that occur several times read."""
    rows = {tuple(prompt): row for row, prompt in reversed(list(enumerate(prompts)))}
    if prefix:
        _read(model, cache, ids[:1, :prefix], mask[:1, :prefix])
        cache.batch_repeat_interleave(len(rows))
    if len(rows) == len(prompts):
        return
    # the last token is left to `generate`, which needs its prediction
    _read(model, cache, ids[list(rows.values()), :-1], mask[list(rows.values()), :-1])
    numbers = {prompt: number for number, prompt in enumerate(rows)}
    chosen = [numbers[tuple(prompt)] for prompt in prompts]
    cache.batch_select_indices(torch.tensor(chosen, dtype=torch.long, device=ids.device))


@torch.no_grad()
def _read(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Add to the cache what the model computes for the tokens [N, W] that it does not hold yet."""
    held = cache.get_seq_length()
    if held == ids.shape[1]:
        return
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model.base_model(
        input_ids=ids[:, held:],
        attention_mask=mask,
        position_ids=positions[:, held:],
        past_key_values=cache,
        use_cache=True,
    )


def _generate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: DynamicCache | None,
    settings: GenerationConfig,
) -> torch.Tensor:
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, past_key_values=cache, generation_config=settings
    )
    assert isinstance(output, torch.Tensor)
    return output
