"""Greedy answers to held-out prompts, in batches.

The answers depend on the model and the prompt only: a model's own generation settings (sampling, temperature,
repetition penalty) play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loratune.model.device import free_memory, is_out_of_memory

TOKEN_LIMIT = 16_384
"""The most tokens of one batch, prompts and answers together, where nobody planned how many fit."""


class Origin(Protocol):
    """Where a conversation comes from."""

    @property
    def file(self) -> str:
        """The file or the data set."""
        ...

    @property
    def line(self) -> int | None:
        """Counted from 1; None where the source has no lines."""
        ...


class Prompt(Protocol):
    """A conversation up to the answer that is wanted."""

    @property
    def input_ids(self) -> Sequence[int]:
        """The rendered conversation, up to where the answer begins."""
        ...

    @property
    def references(self) -> Sequence[str]:
        """The answers in the data, at least one."""
        ...

    @property
    def origin(self) -> Origin:
        """Where it comes from."""
        ...

    @property
    def text(self) -> str:
        """The prompt as the model reads it."""
        ...

    @property
    def question(self) -> str:
        """The prompt as people read it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said to one prompt."""

    text: str
    """Without the stop token. Other special tokens stay visible, since they make an answer wrong."""
    num_tokens: int
    """The generated tokens, with the stop token."""
    stopped: bool
    """Whether the model stopped by itself, before `max_new_tokens`."""


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_token_ids: tuple[int, ...],
    progress: Callable[[int], None] | None = None,
    token_limit: int = TOKEN_LIMIT,
    told: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Answer every prompt with the likeliest token at each place.

    The model's modes, attention implementation and generation settings are afterwards as they were before.

    Args:
        model: The model, its adapter switched on or off by the caller.
        tokenizer: Turns the answers into text.
        prompts: The prompts; none may be empty.
        max_new_tokens: The longest answer, in tokens.
        stop_token_ids: The tokens that end an answer; none: every answer has `max_new_tokens` tokens.
        progress: Called with the number of further answers, after every batch.
        token_limit: The most tokens of one batch, prompts and answers together, so that it takes no more memory than
            training (`MemoryPlan.generation_tokens`). A longer prompt is a batch of its own.
        told: Called when a batch did not fit into memory and is done in halves.

    Returns:
        The answers, in the order of the prompts.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    settings = _greedy(tokenizer, max_new_tokens, stop_token_ids)
    answers: dict[int, Answer] = {}
    with as_generator(base, settings):
        for batch in _batches([len(prompt.input_ids) for prompt in prompts], max_new_tokens, token_limit):
            rows = _generate_or_halve(base, [prompts[index].input_ids for index in batch], settings, told)
            for index, row in zip(batch, rows, strict=True):
                answers[index] = _answer(tokenizer, row, stop_token_ids)
            if progress is not None:
                progress(len(batch))
    return [answers[index] for index in range(len(prompts))]


def _greedy(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, stop_token_ids: tuple[int, ...]
) -> GenerationConfig:
    # What fills rows that have stopped is cut off again, so any token that exists will do.
    padding = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else next(iter(stop_token_ids), 0)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=padding,
    )


@contextmanager
def as_generator(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, an attention that knows padding, and our generation settings instead of the model's.

    `generate` fills what our settings leave open from `model.generation_config`, repetition penalty included, so the
    model's have to be away while it runs.
    """
    modes = [(module, module.training) for module in model.modules()]
    attention, own_settings = model.config._attn_implementation, model.generation_config
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # The last positions of all rows are a slice with gaps, for which torch copies the head once for every row in bfloat16 on
    # a CPU: 3.4 GB more at 90 rows of SmolLM2-135M.
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])) if head else None
    try:
        model.eval()  # type: ignore[no-untyped-call]
        _set_attention(model, "sdpa" if model._supports_sdpa else "eager")
        model.generation_config = settings
        yield
    finally:
        if hook is not None:
            hook.remove()
        model.generation_config = own_settings
        _set_attention(model, attention)
        for module, training in modes:
            module.training = training


def _set_attention(model: PreTrainedModel, name: str | None) -> None:
    # Setting what is set already makes models with attention of their own (BLOOM, MPT) warn.
    if name is not None and name != model.config._attn_implementation:
        model.set_attn_implementation(name)


def _batches(lengths: Sequence[int], max_new_tokens: int, token_limit: int) -> Iterator[list[int]]:
    """Indices by falling length, so that padding is short and a batch that does not fit in memory is the first."""
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * (longest + max_new_tokens) > token_limit:
            yield batch
            batch = []
        if not batch:
            longest = lengths[index]
        batch.append(index)
    if batch:
        yield batch


def _generate_or_halve(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    told: Callable[[str], None],
) -> list[list[int]]:
    try:
        return _generate(model, prompts, settings)
    except (MemoryError, RuntimeError) as error:
        if len(prompts) == 1 or not is_out_of_memory(error):
            raise
    free_memory()
    told(f"out of memory with {len(prompts):,} answers at a time; they are done in halves")
    middle = len(prompts) // 2
    halves = (prompts[:middle], prompts[middle:])
    return [row for half in halves for row in _generate_or_halve(model, half, settings, told)]


def _generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> list[list[int]]:
    """The new tokens of every prompt, with what follows a stop token."""
    width = max(map(len, prompts))
    padding = settings.pad_token_id
    input_ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(  # type: ignore[operator]
        input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
    )
    assert isinstance(output, torch.Tensor)
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _answer(tokenizer: PreTrainedTokenizerBase, row: list[int], stop_token_ids: tuple[int, ...]) -> Answer:
    length = next((place for place, token in enumerate(row) if token in stop_token_ids), None)
    stopped = length is not None
    text = tokenizer.decode(row[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Answer(text=text, num_tokens=len(row) if length is None else length + 1, stopped=stopped)
