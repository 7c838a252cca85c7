"""Compare base and fine-tuned model: the record `evaluation.json`, and its tables for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from loratune.data.rows.conversation import split_thoughts
from loratune.evaluation.scoring import score
from loratune.recipe.short_names import short_names
from loratune.reporting.units import measure_in_words
from loratune.run.errors import plural
from loratune.run.records.evaluation import SIDES_BEFORE

if TYPE_CHECKING:
    from loratune.evaluation.generate import Answer, PromptLike

LEVEL = 0.95
RESAMPLES = 10_000
COUNTS_PER_BLOCK = 2_000_000  # 16 MB of counts at a time, for any number of examples
LARGEST_EXPONENT = 700.0  # exp(710) is infinite, which JSON cannot hold

Columns = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Values = np.ndarray[tuple[int], np.dtype[np.float64]]
NllPair = tuple[float, int]
"""The summed negative log-likelihood of one example, in nats, and its number of supervised tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A difference, fine-tuned minus base, with its confidence interval."""

    difference: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Return the interval as `evaluation.json` holds it."""
        return {"value": self.difference, "low": self.low, "high": self.high}


def paired_bootstrap(
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    seed: int = 0,
    samples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Return the mean difference of two scores of the same items, with its percentile interval.

    Items are drawn with replacement, each with both of its scores, so that an item's difficulty cancels out (Efron and
    Tibshirani 1993, chapter 13). With n items the interval is about 1 + 1/(2n) times too narrow.

    Args:
        base: One score per item.
        tuned: The scores of the same items, in the same order.
        seed: The seed of the resamples.
        samples: The number of resamples.
        level: The confidence level, 0 to 1.

    Raises:
        ValueError: The numbers of scores differ, or there are none.
    """
    if len(base) != len(tuned) or not len(base):
        raise ValueError(
            f"{len(base)} base scores and {len(tuned)} tuned ones; need the same number of both, at least one"
        )
    columns = np.column_stack([np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)])
    resampled = _resampled_sums(columns, seed=seed, samples=samples)[:, 0] / len(base)
    return _interval(float(columns.mean()), resampled, level)


def evaluation_record(
    *,
    metric: str,
    prompts: Sequence[PromptLike],
    base_answers: Sequence[Answer],
    tuned_answers: Sequence[Answer],
    base_nll: Sequence[NllPair],
    tuned_nll: Sequence[NllPair],
    scorer: Callable[[str, str], float] | None = None,
) -> dict[str, Any]:
    """Build the record of `evaluation.json`.

    Args:
        metric: The metric's name; `none` for answers without a score. `bleu` is computed over all answers together, 0
            to 100; any other is a mean over answers, 0 to 1.
        prompts: The prompts that were answered.
        base_answers: One answer per prompt, without the adapter.
        tuned_answers: One answer per prompt, with the adapter.
        base_nll: For every held-out example the summed NLL and the number of its supervised tokens, at least one.
        tuned_nll: The same with the adapter.
        scorer: Scores an answer against one reference, the best of several counts; None for the metric of that name.

    Returns:
        `base` and `tuned`, each with `nll` (nats per supervised token), `perplexity`, and the score under the metric's
        name; `difference` (fine-tuned minus base) of each as `value`, `low`, `high`; `interval`; `items`; for `bleu`
        its `signature`.
    """
    record: dict[str, Any] = {
        "metric": metric,
        "num_examples": len(base_nll),
        "base": {},
        "tuned": {},
        "difference": {},
    }
    _add_nll(record, base_nll, tuned_nll)
    items = []
    if metric == "bleu" and scorer is None:
        one = add_bleu(record, [prompt.references for prompt in prompts], base_answers, tuned_answers)
        items = _items(one, prompts, base_answers, tuned_answers)
    elif metric != "none":
        rate = best_of(scorer or partial(score, metric))
        items = _items(rate, prompts, base_answers, tuned_answers)
        add_scores(record, metric, *([item[side]["score"] for item in items] for side in ("base", "tuned")))
    else:
        items = _items(_unscored, prompts, base_answers, tuned_answers)
    record["interval"] = {"level": LEVEL, "method": "paired bootstrap", "resamples": RESAMPLES}
    record["items"] = items
    return record


def nll_record(base: Sequence[NllPair], tuned: Sequence[NllPair]) -> dict[str, Any]:
    """Return `base`, `tuned` and `difference` of the losses alone, as for `evaluate.forgetting`."""
    record: dict[str, Any] = {"num_examples": len(base), "base": {}, "tuned": {}, "difference": {}}
    _add_nll(record, base, tuned)
    return record


def paired_differences(losses: Sequence[Sequence[NllPair]], *, level: float = LEVEL) -> list[Interval]:
    """Return by how much the loss of each further model exceeds that of the first, in nats per supervised token.

    Rows are drawn with replacement, each with the losses of all models, so that a row's difficulty cancels out.

    Args:
        losses: Of each model the loss of every held-out example, in the same order; two models at least.
        level: The confidence level of each interval, 0 to 1.

    Raises:
        ValueError: The models were not measured on the same rows.
    """
    table = np.asarray(losses, dtype=np.float64)  # [models, rows, 2]
    counts = table[0, :, 1]
    if table.ndim != 3 or not (table[:, :, 1] == counts).all():
        raise ValueError("the models were measured on different rows")
    columns = np.column_stack([*table[:, :, 0], counts])
    resampled = np.vstack([columns.sum(axis=0, keepdims=True), _resampled_sums(columns, seed=0, samples=RESAMPLES)])
    means = resampled[:, :-1] / resampled[:, -1:]
    differences = means[:, 1:] - means[:, :1]
    return [_interval(float(column[0]), column[1:], level) for column in differences.T]


def evaluation_table(record: Mapping[str, Any]) -> Table:
    """Return a table with base, fine-tuned, and their difference with its interval: one row per measure."""
    table = Table(title=f"Held-out: {plural(record['num_examples'], 'conversation')}")
    table.add_column("measure", overflow="fold")
    for column in (side_before(record), "fine-tuned", "difference", f"{record['interval']['level']:.0%} interval"):
        table.add_column(column, justify="right")
    metric = record["metric"]
    if metric == "bleu" and metric in record["base"]:
        label = f"{measure_in_words(metric)} ({plural(len(record['items']), 'answer')})"
        _add_row(table, label, record["base"][metric], record["tuned"][metric], record["difference"][metric])
    elif metric in record["base"]:
        points = {name: 100 * value for name, value in record["difference"][metric].items()}
        table.add_row(
            f"{measure_in_words(metric)} ({plural(len(record['items']), 'answer')})",
            f"{record['base'][metric]:.1%}",
            f"{record['tuned'][metric]:.1%}",
            f"{points['value']:+.1f} points",
            f"{points['low']:+.1f} to {points['high']:+.1f}",
        )
    for name in ("nll", "perplexity"):
        _add_row(table, measure_in_words(name), record["base"][name], record["tuned"][name], record["difference"][name])
    labels = short_names(record.get("sources", {}))
    for name, part in record.get("sources", {}).items():
        source = _plain(f"held-out loss of {labels[name]} ({plural(part['num_examples'], 'conversation')})")
        _add_row(table, source, part["base"]["nll"], part["tuned"]["nll"], part["difference"]["nll"])
    if "forgetting" in record:
        other = record["forgetting"]
        title = f"loss on other data ({plural(other['num_examples'], 'conversation')})"
        _add_row(table, title, other["base"]["nll"], other["tuned"]["nll"], other["difference"]["nll"])
    for task, measures in record.get("harness", {}).get("tasks", {}).items():
        for name, values in measures.items():
            _add_row(table, f"{task}: {name}", values["base"], values["tuned"], values["difference"])
    return table


def side_before(record: Mapping[str, Any]) -> str:
    """Return the title of the column of the model before the run."""
    return SIDES_BEFORE[record.get("before", "base")]


def _add_row(table: Table, label: str | Text, base: float, tuned: float, difference: Mapping[str, float]) -> None:
    interval = f"{difference['low']:+.4g} to {difference['high']:+.4g}" if "low" in difference else ""
    table.add_row(label, f"{base:.4g}", f"{tuned:.4g}", f"{difference['value']:+.4g}", interval)


def samples_table(record: Mapping[str, Any], count: int = 3) -> Table:
    """Return a table of up to `count` items: first those that base and fine-tuned model answer differently."""
    items = record["items"]
    different = [item for item in items if item["base"]["text"] != item["tuned"]["text"]]
    alike = [item for item in items if item["base"]["text"] == item["tuned"]["text"]]
    table = Table(title="Samples", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("text", overflow="fold")
    for item in [*different, *alike][:count]:
        table.add_row("prompt", _plain(item["question"]))
        for reference in item.get("references", [item["reference"]]):
            table.add_row("reference", _plain(reference))
        graded = record["metric"] == "bleu"
        table.add_row(side_before(record), _scored(item["base"], graded=graded))
        table.add_row("fine-tuned", _scored(item["tuned"], graded=graded), end_section=True)
    return table


def _add_nll(record: dict[str, Any], base: Sequence[NllPair], tuned: Sequence[NllPair]) -> None:
    assert len(base) == len(tuned) > 0
    sides = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    assert all((side[:, 1] > 0).all() for side in sides), "an example without supervised tokens"
    add_statistics(record, *sides, {"nll": _nll, "perplexity": _perplexity})


def add_statistics(
    record: dict[str, Any], base: Columns, tuned: Columns, statistics: Mapping[str, Callable[[Columns], Values]]
) -> None:
    """Add measures of all items together: functions of sums over items, paired as in `paired_bootstrap`.

    Args:
        record: The record to add them to.
        base: The terms of the sums, [items, c].
        tuned: The same with the adapter.
        statistics: Name → function from sums [rows, c] to the measure of each row.
    """
    columns = np.hstack([base, tuned])
    width = base.shape[1]
    totals = columns.sum(axis=0, keepdims=True)
    resampled = _resampled_sums(columns, seed=0, samples=RESAMPLES)
    for name, statistic in statistics.items():
        base_value, tuned_value = (float(statistic(side)[0]) for side in (totals[:, :width], totals[:, width:]))
        record["base"][name], record["tuned"][name] = base_value, tuned_value
        differences = statistic(resampled[:, width:]) - statistic(resampled[:, :width])
        record["difference"][name] = _interval(tuned_value - base_value, differences, LEVEL).as_dict()


def _nll(sums: Columns) -> Values:
    """Return the mean NLL per token: summed NLL over the number of tokens."""
    values: Values = sums[:, 0] / sums[:, 1]
    return values


def _perplexity(sums: Columns) -> Values:
    values: Values = np.exp(np.minimum(_nll(sums), LARGEST_EXPONENT))
    return values


def add_bleu(
    record: dict[str, Any], references: Sequence[Sequence[str]], base: Sequence[Answer], tuned: Sequence[Answer]
) -> Callable[[str, Sequence[str]], float]:
    """Add the BLEU of all answers together. Return the function that gives the BLEU of a single answer.

    Args:
        record: The record to add it to.
        references: The references of each answer.
        base: One answer per prompt, without the adapter.
        tuned: The same with the adapter.
    """
    from loratune.evaluation.bleu import Bleu, corpus_bleu, signature, tokenizer_for  # an extra

    tokenize = tokenizer_for(references)
    bleu = Bleu(tokenize)
    base_counts, tuned_counts = (
        np.array(
            [bleu.counts(said(answer), each) for each, answer in zip(references, answers, strict=True)],
            dtype=np.float64,
        )
        for answers in (base, tuned)
    )
    add_statistics(record, base_counts, tuned_counts, {"bleu": corpus_bleu})
    record["signature"] = signature(references, tokenize)
    return bleu.one


def add_scores(record: dict[str, Any], metric: str, base: Sequence[float], tuned: Sequence[float]) -> None:
    """Add the mean scores of both sides, and their paired difference."""
    record["base"][metric], record["tuned"][metric] = math.fsum(base) / len(base), math.fsum(tuned) / len(tuned)
    record["difference"][metric] = paired_bootstrap(base, tuned).as_dict()


Rate = Callable[[str, Sequence[str]], float | None]
"""Scores an answer against all its references; None where there is no metric."""


def _unscored(_answer: str, _references: Sequence[str]) -> None:
    return None


def best_of(rate: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """Return a function that scores an answer by the reference that it matches best."""
    return lambda answer, references: max(rate(answer, reference) for reference in references)


def _items(
    rate: Rate, prompts: Sequence[PromptLike], base: Sequence[Answer], tuned: Sequence[Answer]
) -> list[dict[str, Any]]:
    return [_item(rate, *triple) for triple in zip(prompts, base, tuned, strict=True)]


def _item(rate: Rate, prompt: PromptLike, base: Answer, tuned: Answer) -> dict[str, Any]:
    several = {"references": list(prompt.references)} if len(prompt.references) > 1 else {}
    return {
        "file": prompt.origin.file,
        "line": prompt.origin.line,
        "prompt": prompt.text,
        "question": prompt.question,
        "reference": prompt.references[0],
        **several,
        "base": _scored_answer(rate, base, prompt.references),
        "tuned": _scored_answer(rate, tuned, prompt.references),
    }


def _scored_answer(rate: Rate, answer: Answer, references: Sequence[str]) -> dict[str, Any]:
    return {
        "text": answer.text,
        "score": rate(said(answer), references),
        "num_tokens": answer.num_tokens,
        "stopped": answer.stopped,
    }


def said(answer: Answer) -> str:
    """Return what an answer says without its thoughts, as references are read; an unfinished thought stays."""
    parts = split_thoughts(answer.text)
    return answer.text if parts is None else parts[1]


def _resampled_sums(columns: Columns, *, seed: int, samples: int) -> Columns:
    """Sum the columns [n, c] over n rows drawn with replacement, `samples` times: [samples, c]."""
    generator = np.random.default_rng(seed)
    num_rows = len(columns)
    block = max(1, COUNTS_PER_BLOCK // num_rows)
    sums = []
    for start in range(0, samples, block):  # the numbers of times that rows are drawn are multinomial
        drawn = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=min(block, samples - start))
        sums.append(drawn.astype(np.float64) @ columns)
    return np.concatenate(sums)


def _interval(difference: float, resampled: Values, level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(difference=difference, low=float(low), high=float(high))


def _scored(answer: Mapping[str, Any], *, graded: bool) -> Text:
    mark = Text("✓ ", style="green") if answer["score"] else Text("✗ ", style="red")
    if answer["score"] is None:
        mark = Text("")
    if graded:
        mark = Text(f"{answer['score']:.1f} ", style="bold")
    return mark + _plain(answer["text"] if answer["stopped"] else f"{answer['text']} … (hit the token limit)")


def _plain(text: str, limit: int = 400) -> Text:
    """Return text of the data without rich markup or control sequences, and with the middle of long text cut."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return Text("".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text))
