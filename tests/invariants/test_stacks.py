"""Experts that are stacked in one parameter: counted, trained, loaded by stock PEFT, merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from loratune.model.adapter.patterns import checked_patterns
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.export import export, merge
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import make_moe, recipe_maker
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
IDS = torch.arange(40, 60)[None]
SETTINGS = {
    "lora__target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "lora__rank_pattern": {"down_proj": 2},
}


@pytest.fixture(scope="module")
def moe_model(smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("moe"), smollm2_tokenizer)


@pytest.fixture(scope="module")
def run(moe_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    make = recipe_maker(moe_model, chat_files, tmp_path_factory.mktemp("stacks"))
    return train(make(**SETTINGS, train__save_every=2)).run


@pytest.mark.slow
def test_both_engines_train_the_same_and_a_resumed_run_goes_on(
    run: RunDir, moe_model: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    stock = train(tiny_recipe(**SETTINGS, model__name=str(moe_model), train__engine="trl")).run
    assert_same(run, stock, tolerance=1e-5)
    killed = RunDir.open(shutil.copytree(run.root, tmp_path / "killed"))
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / "6")
    assert_same(run, resume(killed.root).run, tolerance=0)


def test_each_expert_counts(run: RunDir) -> None:
    parameters = read_json(run.plan)["parameters"]
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert parameters["trainable"] == sum(tensor.numel() for tensor in saved.values())
    by_name = {item["name"]: item["trainable"] for item in parameters["per_module"]}
    assert by_name["model.layers.1.mlp.experts.gate_up_proj"] == 4 * 4 * (16 + 48)
    assert by_name["model.layers.1.mlp.experts.down_proj"] == 2 * 4 * (24 + 16)
    assert "experts.gate_up_proj of 4 experts in 2 layers" in parameters["targets"]
    optimizer = load_file(run.checkpoints / "6" / "optimizer.safetensors")
    moments = sum(tensor.numel() for tensor in optimizer.values() if tensor.numel() > 1)
    assert read_json(run.plan)["memory"]["optimizer_bytes"] == 4 * moments


def test_stock_peft_and_the_merged_model_are_what_was_trained(run: RunDir, moe_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(moe_model, dtype=torch.float32)
    untouched = base(IDS).logits.detach()
    with torch.no_grad(), checked_patterns():
        logits = PeftModel.from_pretrained(base, str(run.adapter)).eval()(IDS).logits
    assert float((logits - untouched).abs().max()) > 0.05
    merge(run.root, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    for to in ("vllm", "gguf"):
        with pytest.raises(RecipeError):
            export(run.root, to=to, out=tmp_path / to)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora__target_parameters": ["experts.up"]}, r"known here: mlp\.experts\.down_proj"),
        ({"lora__target_parameters": ["q_proj.weight"]}, r"lora\.targets=\[model\.layers\.0\.self_attn\.q_proj\]"),
        ({"lora__dropout": 0.1}, r"set lora\.dropout: 0"),
        ({"lora__variant": "dora"}, r"requires lora\.variant plain or rslora"),
        ({"train__compile": True}, r"train\.compile is true"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    settings: dict[str, object], problem: str, moe_model: Path, tiny_recipe: MakeRecipe
) -> None:
    with pytest.raises(RecipeError, match=problem):
        prepare(
            tiny_recipe(**{**SETTINGS, "lora__rank_pattern": {}, "model__name": str(moe_model), **settings}),
            NoProgress(),
        )
