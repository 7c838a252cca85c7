"""The `data` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from loratune.recipe.checks import check_data
from loratune.recipe.roles import TrainOn
from loratune.recipe.sections.base import Float, Int, Section, Source, Sources, WrittenSources, as_sources_or_setting

SEED_DATASET = Source(name="HuggingFaceTB/smoltalk", config="all", split="train")

Column = Literal[
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "system", "tools",
    "sentence1", "sentence2", "label", "chosen", "rejected",
]  # fmt: skip


class DataSection(Section):
    """The training and held-out data, and which of their tokens are trained."""

    train: Sources = (SEED_DATASET,)
    """The training data: one source, or a list of sources with weights (a data mixture)."""

    eval: Annotated[
        Literal["auto", "none"] | Float | tuple[Source, ...],
        BeforeValidator(as_sources_or_setting, json_schema_input_type=float | WrittenSources),
    ] = "auto"
    """The held-out (validation) data: a source, the fraction of the training conversations to hold out, or `none`.
    `auto`: the `test` split of a Hub dataset that has one and is given with a config or split, otherwise a fraction of
    0.05."""

    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"] = "auto"
    """The format of the rows. `auto` detects it from all rows."""

    columns: dict[Column, str] = Field(default={})
    """Maps the fields of the format to your column names: `{prompt: mr, completion: ref}` reads the prompt from column
    `mr` and the completion from column `ref`."""

    train_on: TrainOn = Field(default="assistant", union_mode="left_to_right")
    """Which tokens are trained (loss masking). `assistant`: every answer with its stop token (completion-only or
    assistant-only loss); `last`: the last answer only; `all`: every token; a list of roles such as `[user, assistant]`:
    every message of these roles. A message with `train: false` (or `weight: 0`) is context only."""

    thinking: Literal["keep", "strip", "error"] = "keep"
    """How answers with reasoning (`<think>…</think>`) are handled: `keep` trains the reasoning even where the chat
    template would drop it, `strip` removes it from the data, `error` rejects such rows."""

    special_tokens_in_text: Literal["error", "as_text"] = "error"
    """How names of special tokens in texts are handled, such as `<|im_end|>` in a user's message, which a tokenizer
    would read as the token itself. `error` rejects such chat rows (plain text keeps them as tokens); `as_text` trains
    them as ordinary text."""

    max_length: Int | Literal["auto"] = Field(default=1024, union_mode="left_to_right")
    """The maximum sequence length of an example, in tokens. `auto`: the model's context length."""

    on_long: Literal["error", "truncate", "drop", "split"] = "truncate"
    """What happens to examples longer than `max_length`: `error` refuses to start, `truncate` cuts off their end,
    `drop` leaves them out, `split` continues a plain text in the next example and refuses longer conversations.
    Truncated and dropped examples are counted and reported."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to rows that cannot be trained on: `error` refuses to start, `skip` leaves them out and lists them
    in `data.json`."""

    streaming: bool | Literal["auto"] = "auto"
    """Whether to tokenize and verify each row shortly before its step, instead of all rows before training; the data
    report then describes a random sample. For JSON Lines files and Hub datasets. `auto`: with 100,000 rows or more."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_data(self)
        return self
