"""Answers of a run's model become rows: which are chosen, what is left out, and that they can be trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loratune.data.prompts import Prompt
from loratune.data.rows.row import Origin
from loratune.evaluation.generate import Answer
from loratune.evaluation.scoring import score
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.errors import DataError, RecipeError
from loratune.run.progress import NO_PROGRESS, NoProgress
from loratune.workflows import sample as module
from loratune.workflows.sample import SampleSettings, Scored, sample
from tests.conftest import write_jsonl
from tests.run.records.test_outputs import call, check

USER = {"role": "user", "content": "a color"}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": {}}}
DRAWN = ("blue", "red", "blue", "green", "green", "red", "green", "<|im_end|>", " ")


def prompt(*references: str, **values: Any) -> Prompt:
    return Prompt(
        input_ids=[1],
        text="a color",
        question="a color",
        references=references or ("red",),
        origin=Origin(file="prompts.jsonl", line=1),
        messages=(USER,),
        **values,
    )


def answers(texts: Sequence[str], *, cut: Sequence[str] = ()) -> list[Answer]:
    return [Answer(text=text, num_tokens=2, stopped=text not in cut) for text in texts]


EXACT = partial(score, "exact_match")


def scored(rate: Callable[[str, str], float] = EXACT, **settings: Any) -> Scored:
    return Scored(SampleSettings(**settings), rate, lambda text: "<|" in text)


def test_best_and_worst_are_the_answers_that_were_drawn_most_often() -> None:
    assert scored().row(prompt(), answers(DRAWN)) == {"prompt": [USER], "chosen": "red", "rejected": "green"}
    row = scored(keep="best").row(prompt(tools=(TOOL,)), answers(DRAWN))
    assert row == {"messages": [USER, {"role": "assistant", "content": "red"}], "tools": [TOOL]}


def test_the_first_of_equally_frequent_answers_is_taken_and_thoughts_do_not_count() -> None:
    texts = ["<think>green?</think>red", "blue", "green", "red"]
    assert scored().row(prompt(), answers(texts)) == {"prompt": [USER], "chosen": texts[0], "rejected": "blue"}


def test_any_of_several_references_counts() -> None:
    row = scored().row(prompt("red", "blue"), answers(["blue", "green"]))
    assert row == {"prompt": [USER], "chosen": "blue", "rejected": "green"}


@pytest.mark.parametrize(
    ("texts", "settings", "row", "reason"),
    [
        (["red", "red"], {}, None, "all answers scored 1"),
        (["green", "blue"], {}, None, "no answer scored 1"),
        (["green", "blue"], {"keep": "best"}, None, "no answer scored 1"),
        (["<|im_end|>", " "], {"with_reference": True}, None, "no answer is usable"),
        (["green"], {"with_reference": True}, {"chosen": "red", "rejected": "green"}, ""),
        (["red", "red"], {"with_reference": True}, None, "all answers scored 1"),
    ],
)
def test_what_gives_no_row_is_counted(
    texts: list[str], settings: dict[str, Any], row: dict[str, str] | None, reason: str
) -> None:
    found = scored(**settings)
    assert found.row(prompt(), answers(texts)) == (row and {"prompt": [USER], **row})
    assert dict(found.left_out) == ({reason: 1} if reason else {})


def test_graded_answers_need_the_score_that_is_asked_for() -> None:
    def length(answer: str, reference: str) -> float:
        return len(answer) / 10

    texts = ["12345678", "1234", "123456"]
    assert scored(length).row(prompt(), answers(texts)) is None
    row = scored(length, at_least=0.7).row(prompt(), answers(texts))
    assert row == {"prompt": [USER], "chosen": "12345678", "rejected": "1234"}


def test_answers_that_rows_cannot_hold_are_no_candidates_and_are_counted() -> None:
    found = scored()
    assert found.row(prompt(), answers(["red", "redder", *DRAWN[-2:]], cut=["redder"])) is None
    assert found.unusable == {"hit --max-new-tokens": 1, "has a special token": 1, "is empty": 1}
    assert len(found.scores) == 4, "the mean is over all answers"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "the same answer 8 times"),
        ({"n": 1}, "no best and worst"),
        ({"n": 0}, "at least one answer"),
        ({"at_least": 0.0}, "above 0"),
        ({"keep": "worst"}, "best,worst and best"),
    ],
)
def test_settings_that_give_no_rows_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        SampleSettings(**settings).check()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for word in ("one", "two", "three")
    ]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def metric(tmp_path: Path) -> str:
    """Scores are different for most answers of an untrained model."""
    file = tmp_path / "metrics.py"
    file.write_text("def even(answer, reference):\n    return 1.0 - len(answer.strip()) % 2\n", encoding="utf-8")
    return f"{file}:even"


def test_the_rows_can_be_trained_on_and_the_same_seed_draws_them_again(
    finished_run: RunDir, prompts: Path, metric: str, tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    settings = SampleSettings(n=6, temperature=3.0, max_new_tokens=4, at_least=1)
    draw = partial(sample, finished_run.root, prompts, metric=metric, allow_code=True)

    def stops(*arguments: Any, **values: Any) -> list[Answer]:
        return [
            Answer(text=answer.text or "x", num_tokens=answer.num_tokens, stopped=True)
            for answer in real(*arguments, **values)
        ]

    real = module.sample_answers
    with pytest.MonkeyPatch.context() as patch:  # an untrained model ends no answer
        patch.setattr(module, "sample_answers", stops)
        first = draw(tmp_path / "first.jsonl", settings=settings)
        again = draw(tmp_path / "again.jsonl", settings=settings)
        other = draw(tmp_path / "other.jsonl", settings=SampleSettings(n=6, temperature=3.0, max_new_tokens=4, seed=7))
    assert (first.num_prompts, first.num_answers, first.metric) == (3, 18, "even")
    assert first.num_rows + sum(first.left_out.values()) == 3
    assert Path(first.file).read_text() == Path(again.file).read_text() != Path(other.file).read_text()
    rows = [json.loads(line) for line in Path(first.file).read_text().splitlines()]
    assert {len(row["chosen"]) % 2 for row in rows} == {0}
    assert {len(row["rejected"]) % 2 for row in rows} == {1}
    recipe = tiny_recipe().replace(data={"train": first.file, "eval": "none"}, evaluate={"metric": "none"})
    recipe = Recipe.parse({**recipe.model_dump(mode="json", exclude_unset=True), "task": "preference"})
    assert len(prepare(recipe, NO_PROGRESS).data.train) == len(rows)


def test_what_does_not_fit_is_refused_with_the_way_out(finished_run: RunDir, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    draw = partial(sample, finished_run.root, prompts, out, metric="exact_match")
    for metric, words in (("bleu", "scores all answers together"), ("none", "no metric")):
        with pytest.raises(RecipeError, match=words):
            sample(finished_run.root, prompts, out, metric=metric)
    with pytest.raises(DataError, match="do not fit the model's") as caught:
        draw(settings=SampleSettings(max_new_tokens=10**6))
    assert "--max-new-tokens" in str(caught.value)
    with pytest.raises(DataError, match=r"no answer scored 1: 3") as caught:
        draw(settings=SampleSettings(n=2, max_new_tokens=2))
    assert "--with-reference" in str(caught.value)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(RecipeError, match="exists"):
        draw()
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "rows", "problem"),
    [
        ("absent.jsonl", None, "no such file"),
        ("columns.jsonl", [{"Question": "one?", "Reply": "one"}], "matches no known format"),
        ("bad.jsonl", [{"prompt": "one?", "completion": "one"}, {"prompt": "two?", "completion": 2}], "completion"),
        ("text.jsonl", [{"text": "one"}], "plain text"),
    ],
)
def test_errors_of_the_prompts_name_no_setting_of_a_recipe(
    finished_run: RunDir, tmp_path: Path, name: str, rows: list[dict[str, Any]] | None, problem: str
) -> None:
    if rows is not None:
        write_jsonl(tmp_path / name, rows)
    with pytest.raises(DataError, match=problem) as caught:
        sample(finished_run.root, tmp_path / name, tmp_path / "rows.jsonl", metric="exact_match")
    assert "PROMPTS" in caught.value.fix
    assert not re.search(r"data\.|task=", str(caught.value).replace("own data:", ""))


def test_a_reference_that_the_metric_cannot_score_is_named_by_its_line(
    finished_run: RunDir, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="the metric is json, but the reference 'one' is not JSON") as caught:
        sample(finished_run.root, prompts, tmp_path / "rows.jsonl", metric="json")
    assert caught.value.place == f"{prompts}:1"
    assert "evaluate.metric" not in str(caught.value)


def test_prompts_that_are_left_out_are_counted(finished_run: RunDir, prompts: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows[1]["messages"][-1]["train"] = False
    heard: list[str] = []

    class Listener(NoProgress):
        def warn(self, text: str) -> None:
            heard.append(text)

    settings = SampleSettings(n=1, keep="best", with_reference=True, max_new_tokens=2)
    file = write_jsonl(tmp_path / "some.jsonl", rows)
    drawn = sample(
        finished_run.root, file, tmp_path / "rows.jsonl", settings=settings, metric="exact_match", progress=Listener()
    )
    assert drawn.num_prompts == 2
    assert "1 row is left out: without an answer" in heard


def test_the_verb_prints_what_its_schema_says(finished_run: RunDir, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--metric", "exact_match", "--n", "1", "--keep", "best", "--with-reference", "--max-new-tokens", "2"]
    printed = call("sample", finished_run.root, prompts, "--out", out, *options)
    check("sample", printed)
    assert printed["num_rows"] == 3
    assert json.loads(out.read_text().splitlines()[0])["messages"][-1]["content"] == "one"
