"""`loratune evaluate` with all it can measure: data of another kind, a metric of one's own, gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.evaluation.gates import check_gates
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.evaluate import evaluate
from loratune.workflows.train import train
from tests.conftest import write_jsonl


@pytest.fixture
def other_data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Count to {i}.", "completion": " ".join(map(str, range(i)))} for i in range(3, 9)]
    return write_jsonl(tmp_path / "counting.jsonl", rows)


def test_forgetting_a_metric_of_ones_own_and_gates_in_one_evaluation(
    tiny_recipe: Callable[..., Recipe], other_data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(evaluate__forgetting=str(other_data), evaluate__max_new_tokens=4, train__epochs=1)
    trained = train(recipe)
    assert trained.evaluation is not None
    first = trained.evaluation["forgetting"]
    assert first["num_examples"] == 6
    assert first["difference"]["nll"]["value"] == pytest.approx(first["tuned"]["nll"] - first["base"]["nll"])
    assert abs(first["base"]["nll"] - trained.evaluation["base"]["nll"]) > 1e-3, "other data has another loss"
    assert "forgetting" in read_json(trained.run.lock)["inputs"]

    (tmp_path / "own.py").write_text("def longer(answer, reference):\n    return len(answer) > len(reference)\n")
    record = evaluate(
        trained.run.root,
        metric=f"{tmp_path / 'own.py'}:longer",
        gates=("longer>=0", "forgetting.difference.nll.high<-50", "nll<99"),
        allow_code=True,
    ).evaluation
    assert record is not None
    assert record["forgetting"]["base"]["nll"] == pytest.approx(first["base"]["nll"], rel=1e-6)
    assert record["metric"] == "longer"
    for item in record["items"]:
        assert item["tuned"]["score"] == float(len(item["tuned"]["text"]) > len(item["reference"]))
    assert [gate["passed"] for gate in record["gates"]] == [True, False, True]
    assert read_json(trained.run.evaluation) == json.loads(json.dumps(record))
    with pytest.raises(RunError, match="1 of 3 gates failed: forgetting"):
        check_gates(record)
    page = trained.run.report.read_text()
    for words in ("Other data", "6 conversations of another kind", "forgetting.difference.nll.high", "failed"):
        assert words in page, words


def test_a_gate_with_a_wrong_name_costs_no_evaluation(finished_run: RunDir) -> None:
    before = finished_run.evaluation.stat().st_mtime_ns
    with pytest.raises(RecipeError, match="no number exact_mach"):
        evaluate(finished_run.root, gates=("exact_mach>=0.5",))
    assert finished_run.evaluation.stat().st_mtime_ns == before


def test_a_run_without_a_metric_shows_answers_and_can_be_scored_later(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.planning.prepare.UNSCORED_ANSWERS", 4)
    trained = train(tiny_recipe(evaluate__samples=100, evaluate__max_new_tokens=3, train__epochs=0.5))
    assert trained.evaluation is not None
    assert len(trained.evaluation["items"]) == 4
    assert {item[side]["score"] for item in trained.evaluation["items"] for side in ("base", "tuned")} == {None}
    page = trained.run.report.read_text(encoding="utf-8")
    assert page.count('class="sample"') == 4
    assert ">Failures<" not in page
    assert trained.verdict.split(":")[0] in ("better", "not better", "worse")
    record = evaluate(trained.run.root, metric="contains", gates=("contains>=0",)).evaluation
    assert record is not None
    assert record["metric"] == "contains"
    assert len(record["items"]) == 6, "with a metric every prompt is answered"
    assert all(item["tuned"]["score"] in (0.0, 1.0) for item in record["items"])
    with pytest.raises(RecipeError, match="neither a metric of loratune nor a function") as told:
        evaluate(trained.run.root, metric="exact")
    assert "exact_match" in told.value.fix
    log = [line[21:] for line in trained.run.log.read_text(encoding="utf-8").splitlines()]
    again = log.index("evaluate --metric contains")
    failed = log.index("evaluate --metric exact")
    assert log[:again][-1] == trained.verdict
    assert any(line.startswith("better: contains") or "contains" in line for line in log[again + 1 : failed])
    assert log[failed + 1].startswith("RecipeError: --metric exact")


def test_no_answers_if_none_are_wanted_or_none_fit(tiny_recipe: Callable[..., Recipe]) -> None:
    assert prepare(tiny_recipe(evaluate__samples=0), NO_PROGRESS).data.prompts == ()
    long = prepare(tiny_recipe(evaluate__samples=3, evaluate__max_new_tokens=512), NO_PROGRESS)
    assert long.data.prompts == ()
    assert any("none leaves room for evaluate.max_new_tokens=512" in note for note in long.notes.warnings)
    user = prepare(tiny_recipe(evaluate__samples=3, evaluate__max_new_tokens=4, data__train_on=["user"]), NO_PROGRESS)
    assert user.data.prompts == (), "a model that does not learn to answer is not asked"
