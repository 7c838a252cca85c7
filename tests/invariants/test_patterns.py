"""Ranks and scales of single matrices: counted, trained, saved, merged and exported as PEFT reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loratune.exporting.adapter_matrices import read_adapter
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.export import export, merge
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import recipe_maker
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
IDS = torch.arange(40, 60)[None]
PATTERNS = {
    "lora__targets": "complete",
    "lora__rank_pattern": {r"layers\.0\.mlp\..*": 2, "o_proj": 6, "mlp.down_proj": 3},
    "lora__alpha_pattern": {"o_proj": 5, "model.layers.1.self_attn.q_proj": 64.0},
}
RANKS = {"0.mlp.up_proj": 2, "0.mlp.down_proj": 2, "1.mlp.down_proj": 3, "1.mlp.up_proj": 4, "1.self_attn.o_proj": 6}


@pytest.fixture(scope="module")
def patterned(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    make = recipe_maker(tiny_model, chat_files, tmp_path_factory.mktemp("patterned"))
    return train(make(**PATTERNS, train__save_every=2)).run


def test_both_engines_train_the_same_and_a_resumed_run_goes_on(
    patterned: RunDir, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    stock = train(tiny_recipe(**PATTERNS, train__engine="trl")).run
    assert_same(patterned, stock, tolerance=1e-5)
    killed = RunDir.open(shutil.copytree(patterned.root, tmp_path / "killed"))
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / "6")
    assert_same(patterned, resume(killed.root).run, tolerance=0)


def test_the_plan_counts_the_rank_of_each_matrix(patterned: RunDir) -> None:
    saved = load_file(patterned.adapter / "adapter_model.safetensors")
    parameters = read_json(patterned.plan)["parameters"]
    assert parameters["trainable"] == sum(tensor.numel() for tensor in saved.values())
    for item in parameters["per_module"]:
        name = f"base_model.model.{item['name']}"
        assert item["trainable"] == sum(saved[f"{name}.lora_{part}.weight"].numel() for part in "AB")
    for name, rank in RANKS.items():
        assert saved[f"base_model.model.model.layers.{name}.lora_A.weight"].shape[0] == rank


def test_stock_peft_the_merged_model_and_what_vllm_gets_are_the_same_model(
    patterned: RunDir, tiny_model: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    untouched = base(IDS).logits.detach()
    adapted = PeftModel.from_pretrained(base, str(patterned.adapter))
    layers = adapted.get_base_model().model.layers
    assert layers[1].self_attn.o_proj.scaling["default"] == pytest.approx(5 / 6)
    assert layers[1].self_attn.q_proj.scaling["default"] == 16
    assert layers[1].mlp.down_proj.scaling["default"] == pytest.approx(32 / 3)
    logits = adapted(IDS).logits.detach()
    assert float((logits - untouched).abs().max()) > 0.1
    merge(patterned.root, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(IDS).logits.detach(), logits, rtol=1e-4, atol=1e-4)

    # vLLM takes alpha/r from the configuration alone, whatever the ranks of the tensors
    folder = export(patterned.root, to="vllm", out=tmp_path / "vllm").folder
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    for name, update in read_adapter(patterned.adapter).items():
        uniform = read_adapter(folder)[name]
        assert (uniform.rank, uniform.scale) == (6, 1)
        torch.testing.assert_close(uniform.b @ uniform.a, update.scale * update.b @ update.a, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_pissa_takes_as_many_singular_values_as_each_rank_and_saves_twice_as_many(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = {**PATTERNS, "lora__variant": "pissa"}
    fast = train(tiny_recipe(**settings)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    assert read_adapter(fast.adapter)["model.layers.0.mlp.up_proj"].rank == 4
    evaluation = read_json(fast.evaluation)
    last = [line["eval_nll"] for line in fast.read_metrics() if "eval_nll" in line][-1]
    assert evaluation["tuned"]["nll"] == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora__rank_pattern": {"o_proj": 4}}, r"lora\.rank_pattern: o_proj applies to none"),
        ({"lora__alpha_pattern": {".*": 4, "q_proj": 8}}, r"lora\.alpha_pattern: q_proj applies to none"),
        ({"lora__rank_pattern": {"q_proj": 33}, "lora__variant": "pissa"}, r"its rank by lora\.rank_pattern is 33"),
        ({"lora__rank_pattern": {"q(": 4}}, "not a regular expression"),
        ({"lora__rank_pattern": {"q_proj": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_pattern_that_decides_nothing_or_cannot_be_is_refused(
    settings: dict[str, object], problem: str, tiny_recipe: MakeRecipe
) -> None:
    with pytest.raises(RecipeError, match=problem):
        prepare(tiny_recipe(**settings), NoProgress())


def test_training_goes_on_from_a_patterned_adapter_with_its_patterns_alone(
    patterned: RunDir, tiny_recipe: MakeRecipe
) -> None:
    start = {"lora__start_from": str(patterned.adapter)}
    assert prepare(tiny_recipe(**PATTERNS, **start), NoProgress()).adapter.start == patterned.adapter.resolve()
    with pytest.raises(RecipeError, match=r"lora\.rank_pattern is"):
        prepare(tiny_recipe(**{**PATTERNS, "lora__rank_pattern": {"o_proj": 6}}, **start), NoProgress())
