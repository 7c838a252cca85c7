"""What is done with a trained classifier: loaded, merged, compared, uploaded; and the shipped recipe."""

from __future__ import annotations

import json
import runpy
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loratune.evaluation.sampling import Sampling
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.reporting.html import compare
from loratune.reporting.run_diff import diff
from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import LoratuneError, RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.bench import bench
from loratune.workflows.chat import open_chat
from loratune.workflows.export import export, merge
from loratune.workflows.guidance.eject import eject
from loratune.workflows.push import push
from loratune.workflows.result import open_result
from loratune.workflows.serve import serve
from loratune.workflows.train import train
from tests.classifiers import bases, class_recipe, plain_logits

__all__ = ["bases"]

ROOT = Path(__file__).parents[3]

SAME = 1e-5
"""Of numbers in float32, which two orders of summation leave apart."""


def test_the_result_loads_the_classifier(finished: RunDir) -> None:
    result = open_result(finished.root)
    model, tokenizer = result.model(), result.tokenizer()
    logits = model(**tokenizer("please play some music", return_tensors="pt")).logits
    labels = tuple(read_json(finished.lock)["inputs"]["labels"])
    assert logits.shape == (1, len(labels))
    assert tuple(model.config.id2label.values()) == labels
    assert "<td>accuracy</td>" in result._repr_html_()


def test_the_result_of_a_run_from_another_folder_loads_the_classifier_with_the_base_where_it_began(
    finished: RunDir, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(Path(shutil.copytree(finished.root, tmp_path / "project" / "run")))
    shutil.copytree(bases("bert"), tmp_path / "project" / "bert")
    lock, config = read_json(run.lock), read_json(run.adapter / "adapter_config.json")
    lock["recipe"]["model"]["name"], lock["folder"] = "bert", str(tmp_path / "project")
    write_json(run.lock, lock)
    write_json(run.adapter / "adapter_config.json", {**config, "base_model_name_or_path": "bert"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = open_result(run.root)
    inputs = found.tokenizer()("please play some music", return_tensors="pt")
    with torch.no_grad():
        logits = found.model()(**inputs).logits
        expected = AutoPeftModelForSequenceClassification.from_pretrained(
            finished.adapter, num_labels=logits.shape[1], pad_token_id=0
        )
        torch.testing.assert_close(logits, expected.eval()(**inputs).logits, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("kind", [pytest.param("distilbert", marks=pytest.mark.slow), "qwen2"])
def test_merged_is_the_same_classifier(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    run = train(class_recipe(bases(kind), tmp_path, train__epochs=1)).run
    delivered = merge(run.root, tmp_path / "merged")
    assert delivered.certificate["passed"]
    assert delivered.certificate["distributions"]["mean_kl"] < SAME
    assert "same classifier" in delivered.summary
    model = AutoModelForSequenceClassification.from_pretrained(delivered.folder)
    record = read_json(run.evaluation)
    logits = plain_logits(
        model, [item["prompt"] for item in record["items"]], AutoTokenizer.from_pretrained(delivered.folder)
    )
    assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == [
        i["tuned"]["text"] for i in record["items"]
    ]
    assert "merge" in run.report.read_text()


def test_a_merge_that_differs_is_not_kept(finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(shutil.copytree(finished.root, tmp_path / "run"))
    from loratune.workflows.tasks.classification import merge as export_classifier

    real = export_classifier.load_adapter

    def damaged(*args: Any) -> Any:
        model = real(*args)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and name.endswith("weight"):
                parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        return model

    monkeypatch.setattr(export_classifier, "load_adapter", damaged)
    with pytest.raises(LoratuneError, match="differs from base and adapter"):
        merge(run.root, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_writes_text_is_refused(finished: RunDir, tmp_path: Path) -> None:
    recipe = Recipe.load(finished.recipe)
    sampling = Sampling(temperature=0, top_p=1, top_k=0, max_new_tokens=1, seed=0)
    for verb, call in {
        "loratune chat": lambda: open_chat(finished.root, sampling),
        "loratune serve": lambda: serve(finished.root),
        "loratune export --to gguf": lambda: export(finished.root, to="gguf"),
        "loratune export --to ollama": lambda: export(finished.root, to="ollama", merged=True),
        "loratune export --to vllm": lambda: export(finished.root, to="vllm"),
        "loratune bench": lambda: bench(recipe, rounds=1, steps=4, progress=NoProgress()),
        "loratune eject": lambda: eject(
            prepare(recipe, NoProgress()), tmp_path / "x.py", overwrite=False, progress=NoProgress()
        ),
    }.items():
        with pytest.raises(RecipeError, match=f"{verb} is for models that generate text"):
            call()


def test_runs_are_compared_and_pushed(finished: RunDir, tmp_path: Path) -> None:
    other = RunDir(shutil.copytree(finished.root, tmp_path / "other"))
    lock = read_json(other.lock)
    lock["inputs"]["train"]["classes"] = "0" * 64
    write_json(other.lock, lock)
    assert [(item.group, item.name) for item in diff(finished, other)] == [("mask", "train classes")]
    assert "F1 (macro)" in compare([finished.root, other.root], tmp_path / "compare.html").read_text()
    files = {file.path for file in push(finished.root, "someone/intents", dry_run=True).files}
    assert {"adapter_model.safetensors", "README.md", "report.html"} <= files


# ---- the recipe that comes with it


def test_the_example_is_written_again_and_held_out_requests_are_other_ones(tmp_path: Path) -> None:
    folder = ROOT / "examples" / "intents"
    script = tmp_path / "make_data.py"
    script.write_text((folder / "make_data.py").read_text(encoding="utf-8"), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    sides = []
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
        sides.append([json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()])
    assert [set(Counter(row["label"] for row in side).values()) for side in sides] == [{60}, {20}]
    assert not {row["text"] for row in sides[0]} & {row["text"] for row in sides[1]}


def test_the_shipped_recipe_runs(bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = {"model.name": bases("bert"), "train.output_dir": tmp_path / "run", "train.epochs": 0.1}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    record = train(Recipe.load("recipes/classify.yaml", [*overrides, "train.device=cpu"])).evaluation
    assert record is not None
    assert record["confusion"]["labels"] == ["alarm", "lights", "message", "music", "travel", "weather"]
    assert record["majority"]["accuracy"] == pytest.approx(1 / 6)
