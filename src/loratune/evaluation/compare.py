"""Base against tuned: the record `evaluation.json`, and its tables for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from loratune.evaluation.generate import Answer, Prompt
from loratune.evaluation.scoring import score

LEVEL = 0.95
RESAMPLES = 10_000
INDICES_PER_BLOCK = 2_000_000  # 16 MB of indices at a time, whatever the number of examples.
LARGEST_EXPONENT = 700.0  # exp(710) is infinite, which JSON cannot hold.

Columns = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Values = np.ndarray[tuple[int], np.dtype[np.float64]]
NllPair = tuple[float, int]
"""The summed negative log-likelihood of one example, in nats, and its number of supervised tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A difference, tuned minus base, and where it lies with the given confidence."""

    difference: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """As it stands in `evaluation.json`."""
        return {"value": self.difference, "low": self.low, "high": self.high}


def paired_bootstrap(
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    seed: int = 0,
    samples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The mean difference of two scores of the same items, and its percentile interval.

    Items are drawn with replacement, each with both of its scores, so what makes an item hard for both cancels out
    (Efron and Tibshirani 1993, chapter 13). With n items the interval is about 1 + 1/(2n) times too narrow.

    Args:
        base: One score an item.
        tuned: The scores of the same items, in the same order.
        seed: Of the resamples.
        samples: How many resamples.
        level: The confidence.

    Raises:
        ValueError: The scores are not paired, or there are none.
    """
    if len(base) != len(tuned) or not len(base):
        raise ValueError(f"{len(base)} base scores and {len(tuned)} tuned ones; give as many of both, at least one")
    columns = np.column_stack([np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)])
    resampled = _resampled_sums(columns, seed=seed, samples=samples)[:, 0] / len(base)
    return _interval(float(columns.mean()), resampled, level)


def evaluation_record(
    *,
    metric: str,
    prompts: Sequence[Prompt],
    base_answers: Sequence[Answer],
    tuned_answers: Sequence[Answer],
    base_nll: Sequence[NllPair],
    tuned_nll: Sequence[NllPair],
    scorer: Callable[[str, str], float] | None = None,
) -> dict[str, Any]:
    """Put together what `evaluation.json` holds.

    Args:
        metric: The name of how answers are scored; `none`: there are no answers, and no items.
        prompts: The prompts that were answered.
        base_answers: One answer a prompt, without the adapter.
        tuned_answers: The same with it.
        base_nll: Of every held-out example: the summed NLL of its supervised tokens, and their number, all above zero.
        tuned_nll: The same with the adapter.
        scorer: What scores an answer against its reference; None: the metric of that name.

    Returns:
        `base` and `tuned`, each with `nll` (nats per supervised token), `perplexity`, and the mean score under the
        metric's name; `difference` (tuned minus base) of each as `value`, `low`, `high`; `interval`; `items`.
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
    if metric != "none":
        triples = zip(prompts, base_answers, tuned_answers, strict=True)
        rate = scorer or partial(score, metric)
        items = [_item(rate, prompt, base, tuned) for prompt, base, tuned in triples]
        _add_scores(record, metric, items)
    record["interval"] = {"level": LEVEL, "method": "paired bootstrap", "resamples": RESAMPLES}
    record["items"] = items
    return record


def nll_record(base: Sequence[NllPair], tuned: Sequence[NllPair]) -> dict[str, Any]:
    """`base`, `tuned` and `difference` of losses alone, on data of another kind."""
    record: dict[str, Any] = {"num_examples": len(base), "base": {}, "tuned": {}, "difference": {}}
    _add_nll(record, base, tuned)
    return record


def evaluation_table(record: Mapping[str, Any]) -> Table:
    """Base, tuned, and their difference with its interval, one row a measure."""
    table = Table(title=f"Held-out: {record['num_examples']} conversations")
    table.add_column("measure")
    for column in ("base", "tuned", "difference", f"{record['interval']['level']:.0%} interval"):
        table.add_column(column, justify="right")
    metric = record["metric"]
    if metric in record["base"]:
        points = {name: 100 * value for name, value in record["difference"][metric].items()}
        table.add_row(
            f"{metric} ({len(record['items'])} answers)",
            f"{record['base'][metric]:.1%}",
            f"{record['tuned'][metric]:.1%}",
            f"{points['value']:+.1f} points",
            f"{points['low']:+.1f} to {points['high']:+.1f}",
        )
    for name, label in (("nll", "NLL per token"), ("perplexity", "perplexity")):
        _add_row(table, label, record["base"][name], record["tuned"][name], record["difference"][name])
    if "forgetting" in record:
        other = record["forgetting"]
        label = f"other data: NLL per token ({other['num_examples']} conversations)"
        _add_row(table, label, other["base"]["nll"], other["tuned"]["nll"], other["difference"]["nll"])
    for task, measures in record.get("harness", {}).get("tasks", {}).items():
        for name, values in measures.items():
            _add_row(table, f"{task}: {name}", values["base"], values["tuned"], values["difference"])
    return table


def _add_row(table: Table, label: str, base: float, tuned: float, difference: Mapping[str, float]) -> None:
    interval = f"{difference['low']:+.4g} to {difference['high']:+.4g}" if "low" in difference else ""
    table.add_row(label, f"{base:.4g}", f"{tuned:.4g}", f"{difference['value']:+.4g}", interval)


def samples_table(record: Mapping[str, Any], count: int = 3) -> Table:
    """The first items that base and tuned answer differently, side by side; then others, up to `count`."""
    items = record["items"]
    different = [item for item in items if item["base"]["text"] != item["tuned"]["text"]]
    alike = [item for item in items if item["base"]["text"] == item["tuned"]["text"]]
    table = Table(title="Samples", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("text", overflow="fold")
    for item in [*different, *alike][:count]:
        table.add_row("prompt", _plain(item["question"]))
        table.add_row("reference", _plain(item["reference"]))
        table.add_row("base", _scored(item["base"]))
        table.add_row("tuned", _scored(item["tuned"]), end_section=True)
    return table


def _add_nll(record: dict[str, Any], base: Sequence[NllPair], tuned: Sequence[NllPair]) -> None:
    assert len(base) == len(tuned) > 0
    columns = np.column_stack([np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)])
    assert (columns[:, [1, 3]] > 0).all(), "an example without supervised tokens"
    totals = columns.sum(axis=0, keepdims=True)
    resampled = _resampled_sums(columns, seed=0, samples=RESAMPLES)
    for name, statistic in (("nll", _nll), ("perplexity", _perplexity)):
        base_value, tuned_value = (float(statistic(totals, first)[0]) for first in (0, 2))
        record["base"][name], record["tuned"][name] = base_value, tuned_value
        differences = statistic(resampled, 2) - statistic(resampled, 0)
        record["difference"][name] = _interval(tuned_value - base_value, differences, LEVEL).as_dict()


def _nll(sums: Columns, first: int) -> Values:
    """Token-weighted: summed NLL over the number of tokens, from the columns `first` and the one after."""
    values: Values = sums[:, first] / sums[:, first + 1]
    return values


def _perplexity(sums: Columns, first: int) -> Values:
    values: Values = np.exp(np.minimum(_nll(sums, first), LARGEST_EXPONENT))
    return values


def _add_scores(record: dict[str, Any], metric: str, items: Sequence[Mapping[str, Any]]) -> None:
    base, tuned = ([item[side]["score"] for item in items] for side in ("base", "tuned"))
    record["base"][metric], record["tuned"][metric] = math.fsum(base) / len(base), math.fsum(tuned) / len(tuned)
    record["difference"][metric] = paired_bootstrap(base, tuned).as_dict()


def _item(rate: Callable[[str, str], float], prompt: Prompt, base: Answer, tuned: Answer) -> dict[str, Any]:
    return {
        "file": prompt.origin.file,
        "line": prompt.origin.line,
        "prompt": prompt.text,
        "question": prompt.question,
        "reference": prompt.reference,
        "base": _scored_answer(rate, base, prompt.reference),
        "tuned": _scored_answer(rate, tuned, prompt.reference),
    }


def _scored_answer(rate: Callable[[str, str], float], answer: Answer, reference: str) -> dict[str, Any]:
    return {
        "text": answer.text,
        "score": rate(answer.text, reference),
        "num_tokens": answer.num_tokens,
        "stopped": answer.stopped,
    }


def _resampled_sums(columns: Columns, *, seed: int, samples: int) -> Columns:
    """Sums of the columns [n, c] over n rows drawn with replacement, `samples` times: [samples, c]."""
    generator = np.random.default_rng(seed)
    num_rows = len(columns)
    block = max(1, INDICES_PER_BLOCK // num_rows)
    sums = []
    for start in range(0, samples, block):
        chosen = generator.integers(num_rows, size=(min(block, samples - start), num_rows))
        sums.append(np.stack([column[chosen].sum(axis=1) for column in columns.T], axis=1))
    return np.concatenate(sums)


def _interval(difference: float, resampled: Values, level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(difference=difference, low=float(low), high=float(high))


def _scored(answer: Mapping[str, Any]) -> Text:
    mark = Text("✓ ", style="green") if answer["score"] else Text("✗ ", style="red")
    return mark + _plain(answer["text"] if answer["stopped"] else f"{answer['text']} … (did not stop)")


def _plain(text: str, limit: int = 400) -> Text:
    """Text of the data: no rich markup, no control sequences for the terminal, the middle of long text cut."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return Text("".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text))
