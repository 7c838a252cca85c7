"""Score the answers that another program gives to held-out prompts, next to the run's own answers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from loratune.evaluation.generate import Answer
from loratune.evaluation.record import add_bleu, add_scores, best_of, said
from loratune.evaluation.scoring import SCORED, score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def score_answers(metric: str, items: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Any] | None:
    """Score answers, and by how much they differ from the run's.

    Args:
        metric: The metric's name in `evaluation.json`.
        items: Its items.
        answers: The other program's answer to each of them, without its stop token.

    Returns:
        `score` of the answers, `run_score` of the run's own, and `difference` with `value`, `low` and `high`, by a
        paired bootstrap over prompts; None without items, or for a metric of the user's own.
    """
    references = [item.get("references", [item["reference"]]) for item in items]
    ours = [Answer(text=item["tuned"]["text"], num_tokens=0, stopped=True) for item in items]
    theirs = [Answer(text=text, num_tokens=0, stopped=True) for text in answers]
    record: dict[str, Any] = {"base": {}, "tuned": {}, "difference": {}}
    if not items or metric not in (*SCORED, "bleu"):
        return None
    if metric == "bleu":
        add_bleu(record, references, ours, theirs)
    else:
        rate = best_of(partial(score, metric))
        sides = (
            [rate(said(answer), each) for answer, each in zip(side, references, strict=True)] for side in (ours, theirs)
        )
        add_scores(record, metric, *sides)
    return {
        "score": record["tuned"][metric],
        "run_score": record["base"][metric],
        "difference": record["difference"][metric],
    }
