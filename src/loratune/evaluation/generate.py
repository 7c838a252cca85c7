"""Answer prompts in batches: greedily as in evaluation, or sampled.

A model's own generation settings (sampling, temperature, repetition penalty) are not used.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loratune.evaluation.decode import decode
from loratune.evaluation.sampling import Sampling, generation_config
from loratune.model.device import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TOKEN_LIMIT = 16_384
"""The most tokens of one batch, prompts and answers together, without a memory plan."""


class OriginLike(Protocol):
    """The source of a conversation."""

    @property
    def file(self) -> str:
        """The file or dataset."""
        ...

    @property
    def line(self) -> int | None:
        """The line, counted from 1; None where the source has no lines."""
        ...


class PromptLike(Protocol):
    """A conversation up to the answer to generate."""

    @property
    def input_ids(self) -> Sequence[int]:
        """The tokens of the rendered conversation, up to where the answer begins."""
        ...

    @property
    def references(self) -> Sequence[str]:
        """The reference answers from the data, at least one."""
        ...

    @property
    def origin(self) -> OriginLike:
        """The source of the conversation."""
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
    """A model's answer to one prompt."""

    text: str
    """The answer without its stop token. Other special tokens stay visible, since they make an answer wrong."""
    num_tokens: int
    """The number of generated tokens, with the stop token."""
    stopped: bool
    """Whether the answer ended with a stop token, before `max_new_tokens`."""


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    stop_token_ids: tuple[int, ...],
    progress: Callable[[int], None] | None = None,
    token_limit: int = TOKEN_LIMIT,
    warn: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Answer every prompt greedily.

    The model's training modes, attention implementation and generation settings are restored afterwards.

    Args:
        model: The model, with its adapter enabled or disabled by the caller.
        tokenizer: The tokenizer that decodes the answers.
        prompts: The prompts; none may be empty.
        max_new_tokens: The longest answer, in tokens.
        stop_token_ids: The tokens that end an answer; without any, every answer has `max_new_tokens` tokens.
        progress: Called with the number of new answers after every batch.
        token_limit: The most tokens of one batch, prompts and answers together, so that it needs no more memory than
            training (`MemoryPlan.generation_tokens`). A longer prompt is a batch of its own.
        warn: Called when a batch does not fit into memory and is split.

    Returns:
        The answers, in the order of the prompts.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return _answer_all(
        model, tokenizer, prompts, sampling, stop_token_ids, token_limit=token_limit, progress=progress, warn=warn
    )


def sample_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptLike],
    sampling: Sampling,
    *,
    stop_token_ids: tuple[int, ...],
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Answer every prompt once, by drawing tokens; a prompt that is given several times gets several answers.

    The same seed, prompts and machine give the same answers, and the random state of the caller is left alone. Other
    arguments as for `generate_answers`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        return _answer_all(
            model, tokenizer, prompts, sampling, stop_token_ids, token_limit=TOKEN_LIMIT, progress=progress, warn=warn
        )


def _answer_all(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptLike],
    sampling: Sampling,
    stop_token_ids: tuple[int, ...],
    *,
    token_limit: int,
    progress: Callable[[int], None] | None,
    warn: Callable[[str], None],
) -> list[Answer]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    # Rows that have stopped are padded, and cut again in `_answer`: any token that exists will do.
    padding = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else next(iter(stop_token_ids), 0)
    settings = generation_config(sampling, stop_token_ids, padding)
    answers: dict[int, Answer] = {}
    with as_generator(base, settings):
        for batch in _batches([len(prompt.input_ids) for prompt in prompts], sampling.max_new_tokens, token_limit):
            rows = _generate_or_halve(base, [prompts[index].input_ids for index in batch], settings, warn)
            for index, row in zip(batch, rows, strict=True):
                answers[index] = _answer(tokenizer, row, stop_token_ids)
            if progress is not None:
                progress(len(batch))
    return [answers[index] for index in range(len(prompts))]


@contextmanager
def as_generator(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Prepare a model to generate: evaluation mode, an attention that supports padding, our generation settings.

    The model is restored at the end of the block.
    """
    modes = [(module, module.training) for module in model.modules()]
    attention, own_settings = model.config._attn_implementation, model.generation_config
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # The last positions of all rows are a non-contiguous slice, for which torch copies the head once per row in
    # bfloat16 on a CPU: 3.4 GB more at 90 rows of SmolLM2-135M.
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])) if head else None
    try:
        model.eval()  # type: ignore[no-untyped-call]
        _set_attention(model, "sdpa" if model._supports_sdpa else "eager")
        # `generate` takes what our settings leave open from `model.generation_config`, repetition penalty included.
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
    # Setting the same implementation again makes models with their own attention (BLOOM, MPT) warn.
    if name is not None and name != model.config._attn_implementation:
        model.set_attn_implementation(name)


def _batches(lengths: Sequence[int], max_new_tokens: int, token_limit: int) -> Iterator[list[int]]:
    """Yield batches of indices, the longest prompts first.

    Prompts of similar length need little padding, and a batch that does not fit in memory comes first.
    """
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
    warn: Callable[[str], None],
) -> list[list[int]]:
    try:
        return decode(model, prompts, settings)
    except (MemoryError, RuntimeError) as error:
        if len(prompts) == 1 or not is_out_of_memory(error):
            raise
    free_memory()
    warn(f"out of memory with {len(prompts):,} answers at a time; splitting the batch in two")
    middle = len(prompts) // 2
    halves = (prompts[:middle], prompts[middle:])
    return [row for half in halves for row in _generate_or_halve(model, half, settings, warn)]


def _answer(tokenizer: PreTrainedTokenizerBase, row: list[int], stop_token_ids: tuple[int, ...]) -> Answer:
    length = next((index for index, token in enumerate(row) if token in stop_token_ids), None)
    stopped = length is not None
    text = tokenizer.decode(row[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Answer(text=text, num_tokens=len(row) if length is None else length + 1, stopped=stopped)
