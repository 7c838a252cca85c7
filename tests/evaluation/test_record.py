"""The bootstrap against known cases, and the evaluation record and its tables."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from loratune.evaluation.generate import Answer
from loratune.evaluation.record import evaluation_record, evaluation_table, paired_bootstrap, samples_table


@dataclass(frozen=True)
class Place:
    file: str
    line: int | None


@dataclass(frozen=True)
class TinyPrompt:
    text: str
    reference: str
    origin: Place
    input_ids: list[int] = field(default_factory=list)
    more: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference, *self.more)

    @property
    def question(self) -> str:
        return self.text.upper()


def answer(text: str, *, stopped: bool = True) -> Answer:
    return Answer(text=text, num_tokens=3, stopped=stopped)


PROMPTS = [TinyPrompt(f"request {i}", f"right {i}", Place("eval.jsonl", i + 1)) for i in range(4)]
BASE = [answer("right 0"), answer("[red]wrong[/red]", stopped=False), answer("wrong \x1b[31m"), answer("no")]
TUNED = [answer("right 0"), answer("right 1"), answer("right 2"), answer("none")]
BASE_NLL = [(20.0, 10), (3.0, 1), (8.0, 4)]
TUNED_NLL = [(10.0, 10), (3.0, 1), (6.0, 4)]


def record(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "metric": "exact_match",
        "prompts": PROMPTS,
        "base_answers": BASE,
        "tuned_answers": TUNED,
        "base_nll": BASE_NLL,
        "tuned_nll": TUNED_NLL,
    }
    return evaluation_record(**{**settings, **changes})


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_the_interval_of_a_constant_difference_is_a_point() -> None:
    interval = paired_bootstrap([0.1, 0.5, 0.9], [0.3, 0.7, 1.1])
    assert (interval.difference, interval.low, interval.high) == pytest.approx((0.2, 0.2, 0.2))


def test_the_interval_agrees_with_the_normal_one_on_many_items() -> None:
    generator = np.random.default_rng(3)
    base, gain = generator.normal(size=2000), generator.normal(0.3, 1.0, size=2000)
    interval = paired_bootstrap(base.tolist(), (base + gain).tolist())
    half = 1.96 * gain.std() / math.sqrt(2000)
    # 10,000 resamples give each end to about 3 % of the half width.
    assert interval.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(gain.mean() + half, abs=0.1 * half)


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        base = generator.random(100) < 0.3
        # Half of the wrong answers become right, a tenth of the right ones wrong: 0.7·0.5 − 0.3·0.1.
        tuned = np.where(base, generator.random(100) >= 0.1, generator.random(100) < 0.5)
        interval = paired_bootstrap(base.tolist(), tuned.tolist(), seed=trial, samples=1000)
        covered += interval.low <= 0.32 <= interval.high
    # 95 % of 300 is 285, with a standard deviation of 3.8; the method itself is a little narrow at n = 100.
    assert 270 <= covered <= 298


def test_pairing_makes_the_interval_narrower_than_independent_scores_would() -> None:
    base = np.random.default_rng(1).normal(size=200)
    interval = paired_bootstrap(base.tolist(), (base + 0.1).tolist())
    assert interval.high - interval.low < 1e-9


def test_the_bootstrap_is_seeded_and_does_not_depend_on_the_size_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = np.random.default_rng(2).random((2, 50)).tolist()
    first = paired_bootstrap(base, tuned, seed=5)
    assert paired_bootstrap(base, tuned, seed=5) == first
    assert paired_bootstrap(base, tuned, seed=6) != first
    monkeypatch.setattr("loratune.evaluation.record.COUNTS_PER_BLOCK", 5000)
    assert paired_bootstrap(base, tuned, seed=5) == first


@pytest.mark.parametrize(("base", "tuned"), [([], []), ([1.0], [1.0, 2.0])])
def test_scores_without_a_partner_are_refused(base: list[float], tuned: list[float]) -> None:
    with pytest.raises(ValueError, match="need the same number of both"):
        paired_bootstrap(base, tuned)


def test_nll_is_weighted_by_tokens_and_perplexity_is_its_exponential() -> None:
    made = record()
    assert made["base"]["nll"] == pytest.approx(31 / 15)
    assert made["tuned"]["nll"] == pytest.approx(19 / 15)
    assert made["difference"]["nll"]["value"] == pytest.approx(-12 / 15)
    assert made["base"]["perplexity"] == pytest.approx(math.exp(31 / 15))
    assert made["difference"]["perplexity"]["value"] == pytest.approx(math.exp(19 / 15) - math.exp(31 / 15))
    # The examples' own differences are −1, 0 and −0.5 a token: no resample can leave that range.
    assert -1 <= made["difference"]["nll"]["low"] < -0.8 < made["difference"]["nll"]["high"] <= 0


def test_nll_intervals_resample_whole_examples() -> None:
    generator = np.random.default_rng(4)
    counts = generator.integers(1, 50, 400)
    base = [(float(2.0 * n), int(n)) for n in counts]
    gains = generator.normal(0.5, 0.5, 400)
    tuned = [(float((2.0 - gain) * n), int(n)) for gain, n in zip(gains, counts, strict=True)]
    difference = record(base_nll=base, tuned_nll=tuned)["difference"]["nll"]
    # The delta method for a ratio of sums, Σ n·x / Σ n.
    mean = -(gains * counts).sum() / counts.sum()
    half = 1.96 * math.sqrt(((counts * (-gains - mean)) ** 2).sum()) / counts.sum()
    assert difference["value"] == pytest.approx(mean)
    assert difference["high"] - difference["low"] == pytest.approx(2 * half, rel=0.1)


def test_the_record_holds_means_differences_and_every_item() -> None:
    made = record()
    assert (made["base"]["exact_match"], made["tuned"]["exact_match"]) == (0.25, 0.75)
    assert made["difference"]["exact_match"]["value"] == 0.5
    assert made["items"][1] == {
        "file": "eval.jsonl",
        "line": 2,
        "prompt": "request 1",
        "question": "REQUEST 1",
        "reference": "right 1",
        "base": {"text": "[red]wrong[/red]", "score": 0.0, "num_tokens": 3, "stopped": False},
        "tuned": {"text": "right 1", "score": 1.0, "num_tokens": 3, "stopped": True},
    }
    assert json.loads(json.dumps(made, allow_nan=False)) == made


@pytest.mark.parametrize("metric", ["exact_match", "bleu"])
def test_thoughts_are_no_part_of_what_is_scored(metric: str) -> None:
    """References have none: `render_prompts` takes the thoughts of held-out answers away."""
    plain = [answer(f"right {i} and some more words") for i in range(4)]
    prompts = [TinyPrompt(f"request {i}", a.text, Place("eval.jsonl", i + 1)) for i, a in enumerate(plain)]
    thinking = [answer(f"<think>\n\n</think>\n\n{a.text}") for a in plain]
    cut = [answer(f"<think>\nis it {a.text}", stopped=False) for a in plain]
    compared = record(metric=metric, prompts=prompts, base_answers=cut, tuned_answers=thinking)
    assert compared["tuned"][metric] == pytest.approx(100 if metric == "bleu" else 1)
    assert compared["base"][metric] < compared["tuned"][metric]
    assert compared["items"][0]["tuned"]["text"].startswith("<think>"), "shown as it is"


def test_without_a_metric_only_the_loss_is_compared() -> None:
    made = record(metric="none", prompts=[], base_answers=[], tuned_answers=[])
    assert set(made["base"]) == {"nll", "perplexity"}
    assert made["items"] == []
    assert "perplexity" in printed(evaluation_table(made))


def test_a_hopeless_model_still_gives_finite_json() -> None:
    made = record(base_nll=[(5000.0, 2)], tuned_nll=[(1.0, 2)])
    json.dumps(made, allow_nan=False)


def test_the_table_shows_base_tuned_difference_and_interval() -> None:
    text = printed(evaluation_table(record()))
    line = next(line for line in text.splitlines() if "exact match" in line)
    for part in ("exact match (4 answers)", "25.0%", "75.0%", "+50.0 points", "+0.0 to +100.0"):
        assert part in line
    assert "95% interval" in text
    assert "Held-out: 3 conversations" in text


def test_samples_begin_with_items_that_differ_and_show_text_as_it_is() -> None:
    text = printed(samples_table(record()))
    assert "REQUEST 0" not in text
    assert "[red]wrong[/red] … (hit the token limit)" in text
    assert "\x1b" not in text
    assert r"\x1b[31m" in text
    assert "REQUEST 0" in printed(samples_table(record(), count=4))
