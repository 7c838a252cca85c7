"""BLEU is sacrebleu's own, of all answers together, and so is its interval."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from loratune.evaluation import scoring
from loratune.evaluation.bleu import Bleu, corpus_bleu, signature, tokenizer_for
from loratune.evaluation.record import evaluation_record, evaluation_table, samples_table
from loratune.evaluation.scoring import check_metric, check_references
from loratune.run.errors import DataError, MachineError
from tests.evaluation.test_record import Place, TinyPrompt, answer, printed

WORDS = [
    "the",
    "a",
    "cheap",
    "pub",
    "by",
    "river",
    "that",
    "serves",
    "good",
    "food",
    ",",
    ".",
    "Thai",
    "Greek",
    "place",
]


def sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(3, 14)))


GENERATOR = random.Random(5)
# one to four references an item
PROMPTS = [
    TinyPrompt(
        f"mr {i}",
        sentence(GENERATOR),
        Place("eval.csv", i),
        more=tuple(sentence(GENERATOR) for _ in range(i % 4)),
    )
    for i in range(40)
]
BASE = [answer(sentence(GENERATOR)) for _ in PROMPTS]
TUNED = [answer(prompt.references[-1] if i % 3 else sentence(GENERATOR)) for i, prompt in enumerate(PROMPTS)]
NLL = [(2.0, 1)]


def sacrebleus_own(chosen: list[int], answers: list[str]) -> float:
    streams = [[refs[n] if n < len(refs := PROMPTS[i].references) else None for i in chosen] for n in range(4)]
    return float(BLEU().corpus_score([answers[i] for i in chosen], streams).score)


@pytest.mark.parametrize("seed", range(5))
def test_the_bleu_of_any_choice_of_answers_is_sacrebleus_own(seed: int) -> None:
    bleu = Bleu()
    answers = [a.text for a in (TUNED if seed % 2 else BASE)]
    counts = np.array([bleu.counts(text, p.references) for text, p in zip(answers, PROMPTS, strict=True)], dtype=float)
    chosen = random.Random(seed).choices(range(len(PROMPTS)), k=30)
    (value,) = corpus_bleu(counts[chosen].sum(axis=0, keepdims=True))
    assert value == sacrebleus_own(chosen, answers)


def test_answers_without_words_or_matches_have_a_bleu_of_zero() -> None:
    counts = np.array([Bleu().counts("", ["a b"]), Bleu().counts("x y z", ["a b"])], dtype=float)
    assert corpus_bleu(counts).tolist() == [0.0, 0.0]


def record() -> dict[str, object]:
    return evaluation_record(
        metric="bleu", prompts=PROMPTS, base_answers=BASE, tuned_answers=TUNED, base_nll=NLL, tuned_nll=NLL
    )


def test_the_record_has_sacrebleus_scores_and_an_interval_of_resampled_corpora() -> None:
    made = record()
    everything = list(range(len(PROMPTS)))
    base, tuned = (sacrebleus_own(everything, [a.text for a in side]) for side in (BASE, TUNED))
    assert (made["base"]["bleu"], made["tuned"]["bleu"]) == (base, tuned)
    assert made["signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp")
    # the same interval from corpora that sacrebleu itself scores, within what 300 resamples tell
    generator = random.Random(1)
    differences = []
    for _ in range(300):
        chosen = generator.choices(everything, k=len(everything))
        differences.append(
            sacrebleus_own(chosen, [a.text for a in TUNED]) - sacrebleus_own(chosen, [a.text for a in BASE])
        )
    low, high = np.quantile(differences, [0.025, 0.975])
    difference = made["difference"]["bleu"]
    assert difference["value"] == pytest.approx(tuned - base)
    assert difference["low"] == pytest.approx(low, abs=0.15 * (high - low))
    assert difference["high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_items_and_tables_show_all_references_and_no_marks_of_right_and_wrong() -> None:
    made = record()
    assert made["items"][3]["references"] == list(PROMPTS[3].references)
    assert "references" not in made["items"][0]
    assert f"{made['tuned']['bleu']:.4g}" in printed(evaluation_table(made))
    shown = printed(samples_table(made))
    assert "✓" not in shown
    assert PROMPTS[1].references[1] in shown


def test_other_metrics_take_the_reference_that_suits_best() -> None:
    prompts = [TinyPrompt("which", "red", Place("eval.csv", 1), more=("blue",))]
    made = evaluation_record(
        metric="exact_match",
        prompts=prompts,
        base_answers=[answer("green")],
        tuned_answers=[answer("blue")],
        base_nll=NLL,
        tuned_nll=NLL,
    )
    assert (made["base"]["exact_match"], made["tuned"]["exact_match"]) == (0.0, 1.0)


def test_the_signature_counts_the_references() -> None:
    assert signature([["a", "b"], ["c", "d"]]).startswith("nrefs:2|")


def test_without_sacrebleu_the_plan_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="sacrebleu is not installed") as error:
        check_metric("bleu")
    assert "pip install 'sacrebleu>=" in str(error.value)
    check_metric("json")


def test_an_empty_reference_among_several_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        check_references("bleu", [TinyPrompt("which", "red", Place("eval.csv", 1), more=(" ",))])


@pytest.mark.parametrize(
    ("answer", "reference", "tokenizer"),
    [
        ("It rains in Oslo.", "It rains in Bergen.", "13a"),
        ("今天奥斯陆下雨了。", "今天卑尔根下雨了。", "zh"),
        ("今日はオスロで雨が降っています。", "今日はベルゲンで雨が降っています。", "char"),
        ("วันนี้ฝนตกที่ออสโล", "วันนี้ฝนตกที่เบอร์เกน", "char"),
        ("오늘 오슬로에는 비가 옵니다", "오늘 베르겐에는 비가 옵니다", "13a"),
        ("Сегодня в Осло идёт дождь.", "Сегодня в Бергене идёт дождь.", "13a"),
        ("42", "41", "13a"),
    ],
)
def test_words_are_split_by_the_script_of_the_references(answer: str, reference: str, tokenizer: str) -> None:
    assert tokenizer_for([[reference]]) == tokenizer
    assert f"tok:{tokenizer}|" in signature([[reference]], tokenizer)
    bleu = Bleu(tokenizer)
    assert bleu.one(answer, [reference]) < bleu.one(reference, [reference])
    if tokenizer != "13a":
        assert Bleu().one(answer, [reference]) == 0 < bleu.one(answer, [reference]), "one word, wrong as a whole"
