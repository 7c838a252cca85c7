"""Compute the outputs of the trained model and its base that a server is compared with."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from loratune.evaluation.decode import decode
from loratune.evaluation.generate import TOKEN_LIMIT, as_generator
from loratune.evaluation.sampling import Sampling, generation_config
from loratune.exporting.endpoint.reference import (
    EndpointReference,
    GreedyAnswer,
    as_served,
    clear_tokens,
    logprobs_at,
)
from loratune.exporting.places import choose_questions
from loratune.model.arithmetic import float32_arithmetic
from loratune.model.load import is_packed
from loratune.workflows.reference import load_for_places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.exporting.places import Question
    from loratune.training.loss import SupervisedLoss
    from loratune.workflows.finished import FinishedRun

MAX_ANSWERS = 24
"""How many chats a server is asked to answer."""
MAX_ANSWER_TOKENS = 64


def endpoint_reference(finished: FinishedRun) -> EndpointReference:
    """Run base and adapter, and the base alone, in the training code. The model is freed on return."""
    prepared = finished.prepared
    loss, places = load_for_places(finished)
    asked = choose_questions(prepared.data.eval_conversations, prepared.model.tokenizer)
    questions = [question for question in asked if not question.tools][:MAX_ANSWERS]
    limit = min(prepared.recipe.evaluate.max_new_tokens, MAX_ANSWER_TOKENS)
    packed = is_packed(finished.config, prepared.recipe.model)
    examples = list(places.examples)
    total = 2 * (len(examples) + len(questions))
    with (
        finished.progress.task("running base and adapter", total, "examples") as task,
        nullcontext() if packed else float32_arithmetic(loss.model),
    ):
        trained = logprobs_at(loss, examples, task.advance)
        rows = _answer_greedily(finished, loss, questions, limit)
        clear = [clear_tokens(loss, question.input_ids, row) for question, row in zip(questions, rows, strict=True)]
        task.advance(len(questions))
        with loss.model.disable_adapter():
            base = logprobs_at(loss, examples, task.advance)
            base_rows = _answer_greedily(finished, loss, questions, limit)
        task.advance(len(questions))
    answers = [
        _as_answer(finished, question, row, count, base_row)
        for question, row, count, base_row in zip(questions, rows, clear, base_rows, strict=True)
    ]
    return EndpointReference(
        examples=examples,
        trained=trained,
        base=base,
        answers=answers,
        max_new_tokens=limit,
        compared_on=places.compared_on,
        stop_token_ids=finished.stops,
    )


def _answer_greedily(
    finished: FinishedRun, loss: SupervisedLoss, questions: Sequence[Question], limit: int
) -> list[list[int]]:
    """Return the tokens of each answer, the stop token included."""
    tokenizer: Any = finished.prepared.model.tokenizer
    padding = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else finished.stops[0]
    settings = generation_config(Sampling(max_new_tokens=limit), finished.stops, padding)
    model: Any = loss.model.get_base_model()
    rows: list[list[int]] = []
    longest = max((len(question.input_ids) for question in questions), default=0)
    batch = max(1, TOKEN_LIMIT // (longest + limit))
    with as_generator(model, settings):
        for start in range(0, len(questions), batch):
            rows += decode(model, [question.input_ids for question in questions[start : start + batch]], settings)
    return [_until_stop(row, finished.stops) for row in rows]


def _until_stop(row: Sequence[int], stops: Sequence[int]) -> list[int]:
    end = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
    return list(row[:end])


def _as_answer(
    finished: FinishedRun, question: Question, row: Sequence[int], num_clear: int, base_row: Sequence[int]
) -> GreedyAnswer:
    tokenizer = finished.prepared.model.tokenizer
    clear = list(row[:num_clear])
    ends = num_clear == len(row) and bool(clear) and clear[-1] in finished.stops
    return GreedyAnswer(
        question=question,
        clear=as_served(tokenizer, clear),
        stop=clear[-1] if ends else None,
        base=as_served(tokenizer, base_row),
    )
