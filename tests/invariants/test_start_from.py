"""Training that goes on from a saved adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.reporting.verdict import verdict_on
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.run.records.base import parse
from loratune.run.records.evaluation import EvaluationRecord
from loratune.workflows.evaluate import evaluate
from loratune.workflows.reproduce import reproduce
from loratune.workflows.result import open_result
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import recipe_maker
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]


class Warned(NoProgress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture(scope="module", params=["plain", pytest.param("dora", marks=pytest.mark.slow)])
def first(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    chat_files: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDir:
    make = recipe_maker(tiny_model, chat_files, tmp_path_factory.mktemp("first"))
    return train(make(lora__variant=request.param)).run


def settings(first: RunDir) -> dict[str, object]:
    return {"lora__start_from": str(first.adapter), "lora__variant": read_json(first.lock)["recipe"]["lora"]["variant"]}


def test_the_first_loss_is_where_the_adapter_ended_and_both_engines_go_on_alike(
    first: RunDir, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    short = {"train__epochs": 0.1, "train__learning_rate": 1e-30}
    still = train(tiny_recipe(**settings(first), **short, train__output_dir=str(tmp_path / "still"))).run
    before = load_file(first.adapter / "adapter_model.safetensors")
    after = load_file(still.adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=0)
    assert read_json(still.evaluation)["tuned"] == read_json(first.evaluation)["tuned"]
    fast = train(tiny_recipe(**settings(first))).run
    stock = train(tiny_recipe(**settings(first), train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    for run in (fast, stock):
        record = read_json(run.evaluation)
        assert record["before"] == "start"
        assert record["base"] == pytest.approx(read_json(first.evaluation)["tuned"], rel=1e-6)
        assert "than where it began" in verdict_on(parse(EvaluationRecord, record)).sentence


@pytest.mark.slow
def test_a_continued_run_is_compared_with_where_it_began_as_long_as_that_is_known(
    first: RunDir, tiny_recipe: MakeRecipe
) -> None:
    run = train(tiny_recipe(**settings(first))).run
    record = read_json(run.evaluation)
    assert record["base"] != record["tuned"]
    again = evaluate(run.root).evaluation
    assert again is not None
    assert again["base"] == pytest.approx(record["base"], rel=1e-6)
    assert again["tuned"] == pytest.approx(record["tuned"], rel=1e-6), "the fine-tuned adapter is put back"
    assert "before" in open_result(run.root)._repr_html_()
    page = run.report.read_text()
    assert "Before vs. fine-tuned</h2>" in page
    assert "Base vs. fine-tuned" not in page
    assert "before " in page
    saved = run.start / "adapter_model.safetensors"
    other = load_file(saved)
    saved.unlink()
    for change in (None, {name: weight * 2 for name, weight in other.items()}):
        if change is not None:
            save_file(change, saved)
        progress = Warned()
        bare = evaluate(run.root, progress=progress).evaluation
        assert bare is not None
        assert bare["before"] == "base"
        assert bare["base"] == pytest.approx(read_json(first.evaluation)["base"], rel=1e-6)
        assert bare["tuned"] == pytest.approx(record["tuned"], rel=1e-6)
        assert any("with the base alone" in text for text in progress.told)


@pytest.mark.slow
def test_a_resumed_and_a_reproduced_run_are_the_same_and_know_their_adapter(
    first: RunDir, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    start = shutil.copytree(first.adapter, tmp_path / "start")
    chosen = {**settings(first), "lora__start_from": str(start), "train__save_every": 2}
    run = train(tiny_recipe(**chosen)).run
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert read_json(run.lock)["inputs"]["start"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert reproduce(run.root).equal
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "6")
    resume(run.root)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == weights
    shutil.rmtree(run.adapter)
    shutil.copy(run.checkpoints / "2" / "adapter_model.safetensors", start)
    with pytest.raises(RecipeError, match=r"inputs\.start\.adapter_model\.safetensors"):
        resume(run.root)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lora__r": 8}, r"lora\.r is 8, but the adapter of lora\.start_from has 4"),
        ({"lora__alpha": 7}, r"lora\.alpha is 7.*has "),
        ({"lora__variant": "rslora"}, r"lora\.variant is rslora, but the adapter of lora\.start_from has"),
        ({"lora__targets": "complete"}, r"lacks model\.layers\.0\.mlp\.\w+\.lora_A\.weight, which the recipe trains"),
        ({"lora__layers": "last 1"}, r"has model\.layers\.0\.self_attn\..*, which the recipe does not train"),
    ],
)
def test_an_adapter_that_the_recipe_does_not_describe_is_refused(
    first: RunDir, changed: dict[str, object], words: str, tiny_recipe: MakeRecipe
) -> None:
    with pytest.raises(RecipeError, match=words):
        prepare(tiny_recipe(**{**settings(first), **changed}), NoProgress())


def test_what_is_no_safe_lora_adapter_or_would_be_overwritten_is_refused(
    first: RunDir, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def refused(folder: Path, words: str, **more: object) -> None:
        with pytest.raises(RecipeError, match=words):
            prepare(tiny_recipe(**{**settings(first), "lora__start_from": str(folder), **more}), NoProgress())

    refused(tmp_path / "none", "no such folder")
    pickled = shutil.copytree(first.adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "no adapter_model.safetensors in it")
    pattern = shutil.copytree(first.adapter, tmp_path / "pattern")
    config = json.loads((pattern / "adapter_config.json").read_text())
    (pattern / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    refused(pattern, "uses lora_bias")
    (pattern / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    noted = prepare(tiny_recipe(**{**settings(first), "lora__start_from": str(pattern)}), NoProgress()).notes.warnings
    assert sum("trained on org/other" in note for note in noted) == 1
    (pattern / "adapter_config.json").write_text("{")
    refused(pattern, "cannot be read")
    assert not any(
        "trained on" in note for note in prepare(tiny_recipe(**settings(first)), NoProgress()).notes.warnings
    )
    refused(first.adapter, "inside the run directory", train__output_dir=str(first.root))
    with pytest.raises(RecipeError, match="pissa, which initializes A and B"):
        tiny_recipe(lora__variant="pissa", lora__start_from=str(first.adapter))
