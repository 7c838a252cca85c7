from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from loratune.evaluation import lm_eval
from loratune.evaluation.lm_eval import check_harness, run_harness
from loratune.run.directory import RunDir
from loratune.run.errors import MachineError, RecipeError

TASK = """task: colors
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "green", "blue"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    data = tmp_path / "colors.jsonl"
    rows = [{"question": f"Describe thing {i}", "answer": i % 3} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "colors.yaml"
    path.write_text(TASK.format(data=data))
    return path


@pytest.mark.filterwarnings("ignore")  # of the harness's many dependencies
def test_a_local_task_is_answered_by_base_and_tuned(task: Path, finished_run: RunDir) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    model = AutoPeftModelForCausalLM.from_pretrained(str(finished_run.adapter))
    tokenizer = AutoTokenizer.from_pretrained(finished_run.adapter)
    check_harness([str(task)], allow_code=False)
    record = run_harness(model, tokenizer, [str(task)], before=model.disable_adapter, allow_code=False)
    accuracy = record["tasks"]["colors"]["acc"]
    assert record["chat_template"]
    assert accuracy["difference"]["value"] == pytest.approx(accuracy["tuned"] - accuracy["base"])
    assert accuracy["difference"]["low"] <= accuracy["difference"]["value"] <= accuracy["difference"]["high"]
    for side in ("base", "tuned"):  # of six questions
        assert (accuracy[side] * 6) % 1 == pytest.approx(0, abs=1e-9)


def test_a_task_with_code_needs_leave(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda _: object())
    task.write_text(task.read_text() + "process_results: !function own.score\n")
    with pytest.raises(RecipeError, match="runs Python code") as error:
        check_harness([str(task)], allow_code=False)
    assert "--allow-code" in error.value.fix
    check_harness([str(task)], allow_code=True)
    with pytest.raises(RecipeError, match="does not exist"):
        check_harness(["elsewhere.yaml"], allow_code=True)


def test_without_the_harness_the_fix_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda _: None)
    with pytest.raises(MachineError) as error:
        check_harness(["arc_easy"], allow_code=False)
    assert "lm-eval>=" in error.value.fix
