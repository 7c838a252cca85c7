"""The model before a run: the adapter off, or the one that the run began with; afterwards everything is as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loratune.model.adapter.attach import load_adapter
from loratune.model.adapter.start_from import WEIGHTS, adapter_fingerprint
from loratune.run.directory import RunDir, read_json, write_json
from loratune.workflows.before_training import before_training, keep_start, started_from_adapter
from tests.training.test_checkpoint_values import Warnings


@pytest.fixture
def run(finished_run: RunDir, tmp_path: Path) -> RunDir:
    """A run that began with another adapter than the one it ended with."""
    run = RunDir.at(shutil.copytree(finished_run.root, tmp_path / "run"))
    other = shutil.copytree(run.adapter, tmp_path / "other")
    save_file({name: weight * 2 for name, weight in load_file(other / WEIGHTS).items()}, other / WEIGHTS)
    keep_start(run, other)
    lock = read_json(run.lock)
    lock["inputs"]["start"] = adapter_fingerprint(other)
    write_json(run.lock, lock)
    return run


def test_inside_it_is_the_model_that_the_run_began_with_and_outside_it_is_the_trained_one(run: RunDir) -> None:
    base = read_json(run.lock)["inputs"]["model_path"]
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), run.adapter)
    began = load_adapter(AutoModelForCausalLM.from_pretrained(base), run.start)
    ids = torch.tensor([[5, 6, 7]])

    def logits(which: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = which(ids).logits
        return found

    trained = logits(model)
    with model.disable_adapter():
        bare = logits(model)
    with before_training(model, run, started=True):
        assert logits(model).equal(logits(began))
    assert logits(model).equal(trained)
    with before_training(model, run, started=False):
        assert logits(model).equal(bare)
    with pytest.raises(KeyError), before_training(model, run, started=True):
        raise KeyError
    assert logits(model).equal(trained), "an error leaves nothing changed either"
    for other in (logits(began), bare):
        assert not trained.equal(other)


def test_an_adapter_that_is_gone_or_another_one_is_told(run: RunDir, finished_run: RunDir) -> None:
    told = Warnings()
    assert started_from_adapter(run, told)
    assert not started_from_adapter(finished_run, told)
    assert not told.lines
    shutil.copyfile(run.adapter / WEIGHTS, run.start / WEIGHTS)
    assert not started_from_adapter(run, told)
    shutil.rmtree(run.start)
    assert not started_from_adapter(run, told)
    assert len(told.lines) == 2
    assert "with the base alone" in told.lines[0]
