"""Examples in TRL's format, and the check behind `eject`: whether stock TRL prepares the same tokens and labels."""

from __future__ import annotations

import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset as HubDataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loratune.data.examples import Example


def check_trl_can_train(causal_lm: PreTrainedModel) -> None:
    """Refuse a model that `SFTTrainer` cannot train.

    Raises:
        RecipeError: TRL 1.16 takes the hidden states from `base_model`, and the model has no decoder of that name.
    """
    if causal_lm.base_model is causal_lm:
        raise RecipeError(
            f"stock TRL cannot train {type(causal_lm).__name__}, whose base_model is itself and not its decoder",
            fix="train.engine=fast",
        )


def with_label_ids(examples: Sequence[Example]) -> HubDataset:
    """Return examples in TRL's tokenized format: `input_ids`, and `labels` with -100 where nothing is trained."""
    rows = [
        {
            "input_ids": example.input_ids.tolist(),
            "labels": [
                token if trained else -100
                for token, trained in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True)
            ],
        }
        for example in examples
    ]
    return HubDataset.from_list(rows)


def preparation_difference(
    rows: HubDataset,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    assistant_only: bool,
) -> str:
    """Describe how the tokens or labels that `SFTTrainer` prepares differ from the examples; "" if they are equal.

    A real trainer prepares the rows, with a tiny model, so what is compared is what it would train. The label of the
    first token is ignored, since nothing predicts it.

    Args:
        rows: The rows as `load_dataset` returns them.
        examples: The examples that loratune trains.
        tokenizer: The base model's tokenizer.
        max_length: Tokens of the longest example.
        assistant_only: TRL's `assistant_only_loss`.
    """
    try:
        prepared, _ = _prepare(rows, tokenizer, max_length=max_length, assistant_only=assistant_only)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # what TRL raises on data it cannot handle
        return f"TRL refuses the rows: {str(error).partition('. ')[0]}"
    if len(prepared) != len(examples):
        return f"TRL makes {len(prepared):,} examples of the rows, loratune {len(examples):,}"
    for number, (theirs, ours) in enumerate(zip(prepared, with_label_ids(examples), strict=True)):
        if theirs["input_ids"] != ours["input_ids"]:
            return f"TRL's tokens differ, first in {examples[number].origin}"
        if theirs["labels"][1:] != ours["labels"][1:]:
            trained = [sum(label != -100 for label in row["labels"][1:]) for row in (theirs, ours)]
            return (
                f"TRL's trained tokens differ, first in {examples[number].origin}: TRL trains {trained[0]} of it, "
                f"loratune {trained[1]}"
            )
    return ""


def trl_preparation_seconds(
    rows: HubDataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, assistant_only: bool
) -> float | None:
    """Measure the seconds that `SFTTrainer` takes to prepare rows in one process, its default; None if it refuses them.

    Arguments as in `preparation_difference`.
    """
    try:
        return _prepare(rows, tokenizer, max_length=max_length, assistant_only=assistant_only)[1]
    except (ValueError, KeyError, TypeError, RuntimeError):
        return None


def _prepare(
    rows: HubDataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, assistant_only: bool
) -> tuple[Any, float]:
    """Have `SFTTrainer` prepare the rows; return its training data and the seconds that it took."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            arguments = SFTConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                report_to=[],
                max_length=max_length,
                assistant_only_loss=assistant_only,
            )
            trainer = _TimedTrainer(
                model=LlamaForCausalLM(config), args=arguments, train_dataset=rows, processing_class=tokenizer
            )
            return trainer.train_dataset, trainer.prepare_seconds
    finally:
        if shown:
            enable_progress_bar()


class _TimedTrainer(SFTTrainer):
    prepare_seconds = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.prepare_seconds += time.perf_counter() - started
        return prepared
