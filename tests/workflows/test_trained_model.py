"""The model of a run in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.trained_model import load_model_of, load_tokenizer_of


def test_it_is_the_model_that_peft_loads(finished_run: RunDir) -> None:
    model, tokenizer = load_model_of(finished_run, NO_PROGRESS), load_tokenizer_of(finished_run, NO_PROGRESS)
    assert not model.training
    ids = tokenizer("<|im_start|>user\nDescribe thing 7<|im_end|>\n", return_tensors="pt")["input_ids"]
    expected = AutoPeftModelForCausalLM.from_pretrained(str(finished_run.adapter))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert float((model(ids).logits - expected(ids).logits).abs().max()) > 0.1


def test_a_run_that_has_not_finished_has_none(finished_run: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    shutil.rmtree(run.adapter)
    for load in (load_model_of, load_tokenizer_of):
        with pytest.raises(RecipeError, match="the run has no adapter yet"):
            load(run, NO_PROGRESS)
