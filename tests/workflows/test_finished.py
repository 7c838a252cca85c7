"""Opening a finished run: what it is made of, and what is refused."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.evaluation.sampling import Sampling
from loratune.planning.lock import changed_inputs
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.chat import open_chat
from loratune.workflows.evaluate import evaluate
from loratune.workflows.export import merge
from loratune.workflows.finished import open_finished, open_run, recipe_here, recipe_of
from loratune.workflows.push import push
from loratune.workflows.reproduce import reproduce
from loratune.workflows.serve import serve
from loratune.workflows.train import train


@pytest.fixture
def run(finished_run: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the finished run, to change."""
    return RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "run")))


def test_a_finished_run_is_opened_with_its_base_adapter_and_stops(finished_run: RunDir, tiny_model: Path) -> None:
    finished = open_finished(finished_run.root, NO_PROGRESS)
    assert finished.name == "tiny"
    assert finished.base == tiny_model
    assert finished.base_bytes == (tiny_model / "model.safetensors").stat().st_size
    assert finished.source is None
    assert 2 in finished.stops
    assert "model.layers.0.self_attn.q_proj" in finished.updates
    assert finished.prepared.recipe == recipe_of(finished_run)


def test_a_run_is_used_on_a_machine_without_what_only_training_needs(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = read_json(run.lock)
    lock["recipe"]["train"] |= {"report_to": ["wandb"], "optimizer": "lion", "device": "cuda", "compile": True}
    lock["recipe"]["lora"]["start_from"] = "/elsewhere/adapter"
    run.lock.write_text(json.dumps(lock))
    for name in ("loratune.planning.checks.find_spec", "loratune.model.device.cpp_compiler"):
        monkeypatch.setattr(name, lambda *_: None)
    recipe = recipe_here(run, NO_PROGRESS)
    assert recipe.train.report_to == ()
    assert open_run(run.root, NO_PROGRESS)[1].recipe.train.device == recipe.train.device
    assert evaluate(run.root).evaluation is not None


def test_a_run_that_reported_to_tensorboard_is_used_without_it(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    run = train(tiny_recipe(train__report_to=["tensorboard"], train__epochs=1, evaluate__metric="none")).run
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        importlib.import_module("torch.utils.tensorboard")
    before = read_json(run.evaluation)["tuned"]["nll"]
    assert evaluate(run.root).evaluation is not None
    assert read_json(run.evaluation)["tuned"]["nll"] == pytest.approx(before)
    assert merge(run.root, tmp_path / "merged", dtype="float32").certificate["verdict"] == "same"


def test_the_recipe_is_the_effective_one_by_run_or_by_path(finished_run: RunDir) -> None:
    recipe = recipe_of(finished_run)
    assert recipe == recipe_of(str(finished_run.root))
    assert recipe.lora.r == 4
    assert recipe.train.token_budget != "auto"


@pytest.mark.parametrize(
    "verb",
    [
        lambda root: open_run(root, NO_PROGRESS),
        lambda root: open_chat(root, Sampling()),
        lambda root: push(root, "me/tiny", dry_run=True),
        evaluate,
        reproduce,
        serve,
    ],
)
def test_every_verb_refuses_a_run_without_an_adapter(verb: Callable[[Path], object], run: RunDir) -> None:
    (run.adapter / "adapter_config.json").unlink()
    with pytest.raises(RecipeError, match="the run has no adapter yet") as error:
        verb(run.root)
    assert error.value.fix == f"`loratune resume {run.root}`"


def test_a_file_added_to_the_model_since_the_run_is_ignored_and_a_changed_one_is_not(run: RunDir) -> None:
    lock = read_json(run.lock)
    model = lock["inputs"]["model"]
    assert {"config.json", "generation_config.json"} <= set(model)
    now = json.loads(json.dumps(lock))
    del model["generation_config.json"]  # the run did not know it
    run.lock.write_text(json.dumps(lock))
    assert changed_inputs(lock, now) == ["inputs.model.generation_config.json"]
    assert changed_inputs(lock, now, known_only=True) == []
    opened, prepared = open_run(run.root, NO_PROGRESS)
    assert opened == run
    written = recipe_of(run)
    here = written.train.model_copy(update={"output_dir": str(run.root)})
    assert prepared.recipe == written.model_copy(update={"train": here})
    model["config.json"] = "0" * 64
    run.lock.write_text(json.dumps(lock))
    assert changed_inputs(lock, now, known_only=True) == ["inputs.model.config.json"]
    with pytest.raises(RecipeError, match=r"changed since the run: inputs\.model\.config\.json"):
        open_run(run.root, NO_PROGRESS)


def test_a_file_removed_from_the_model_is_a_change() -> None:
    before = {"inputs": {"model": {"a": "1", "b": "2"}}}
    now = {"inputs": {"model": {"a": "1"}}}
    assert changed_inputs(before, now, known_only=True) == ["inputs.model.b"]
