"""The amounts of work of a run, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from loratune.data.examples import Example
from loratune.data.prepared import PreparedData
from loratune.data.prompts import Prompt
from loratune.data.rows.row import Origin
from loratune.planning.cost import num_answers, token_sizes, work_amounts
from loratune.planning.speed import WorkAmounts
from loratune.recipe.recipe import Recipe
from tests.planning.memory import records

ORIGIN = Origin(file="x", line=1)
CONFIG = LlamaConfig(num_hidden_layers=10)


def example(tokens: int, supervised: int) -> Example:
    return Example(
        input_ids=np.zeros(tokens, np.int32), supervised=np.arange(tokens) >= tokens - supervised, origin=ORIGIN
    )


def prompt(tokens: int) -> Prompt:
    return Prompt(input_ids=[0] * tokens, text="", question="", references=("",), origin=ORIGIN)


DATA = PreparedData(
    train=[example(20 + n, 5) for n in range(12)],
    eval=[example(30, 7), example(50, 9)],
    eval_conversations=[],
    report={},
)
PROMPTS = (prompt(10), prompt(25), prompt(15))


def recipe(samples_every: str | float = "never", **train: Any) -> Recipe:
    settings = {"batch_size": 4, "epochs": 2, **train}
    evaluate = {"max_new_tokens": 8, "samples_every": samples_every}
    return Recipe.parse({"data": {"train": "x.jsonl", "eval": "x.jsonl"}, "evaluate": evaluate, "train": settings})


def amounts(**train: Any) -> WorkAmounts:
    return work_amounts(
        recipe(**train), CONFIG, records.plan(), data=DATA, prompts=PROMPTS, longest_answer=5, load_bytes=99
    )


def test_the_amounts_are_those_counted_by_hand() -> None:
    made = amounts()
    assert made.tokens == 2 * sum(20 + n for n in range(12))
    assert made.supervised == 2 * 12 * 5
    assert (made.held_out_tokens, made.held_out_supervised) == (80, 7 + 9 - 0)
    assert made.prompt_tokens == 10 + 25 + 15
    assert made.decode_steps == 8 + 5, (
        "one batch: the base runs to the limit, the fine-tuned model to the longest answer"
    )
    assert (made.num_layers, made.num_recomputed, made.load_bytes) == (10, 0, 99)


@pytest.mark.parametrize(
    ("eval_every", "evaluations"),
    [
        ("epoch", 1 + 2),
        (2, 1 + 3),
        (4, 1 + 2),
        ("never", 1 + 1),
    ],
)
def test_base_and_fine_tuned_model_are_evaluated_whatever_the_cadence(eval_every: str | int, evaluations: int) -> None:
    # 6 steps: the base's loss, one for each time that the cadence says, which includes the last step. `never` leaves
    # out those during training; the fine-tuned model is evaluated at the end all the same.
    assert amounts(eval_every=eval_every).evaluations == evaluations


@pytest.mark.parametrize(("samples_every", "looks"), [("never", 0), ("epoch", 1), (2, 2), (4, 1), (0.5, 1), (9, 0)])
def test_answers_during_training_are_counted_without_those_of_the_evaluation(
    samples_every: str | float, looks: int
) -> None:
    # 6 steps; the answers after the last one are those of the evaluation.
    assert amounts(samples_every=samples_every).decode_steps == 8 + 5 + looks * 8


def test_the_sizes_are_those_of_the_longest_examples_and_the_largest_step() -> None:
    sizes = token_sizes(recipe(), DATA, PROMPTS)
    assert (sizes.longest, sizes.held_out, sizes.prompt, sizes.num_prompts) == (31, 50, 25, 3)
    assert 4 * 20 < sizes.largest_step <= 28 + 29 + 30 + 31
    assert sizes.max_new_tokens == 8
    padded = token_sizes(recipe(), DATA, (), padded=True)
    assert padded.largest_step == 4 * 31
    assert padded.max_new_tokens == 0


def test_answers_are_generated_in_batches_that_fit() -> None:
    memory = records.plan(num_prompts=1000, prompt=90, max_new_tokens=60)
    assert num_answers((), memory, 60) == 1
    assert num_answers([prompt(90)] * 1000, memory, 60) == memory.generation_tokens // 150
    assert num_answers([prompt(90)] * 2, memory, 60) == 2
    assert num_answers([prompt(10**6)], memory, 60) == 1
