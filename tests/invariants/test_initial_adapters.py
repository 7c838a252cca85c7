"""Adapters that begin with what data or a quantized base says, and rates of single modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loratune.model.adapter.eva_loftq import batches_for_eva
from loratune.model.quantization.quantize import as_multiplied
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.export import merge
from loratune.workflows.load import attach_adapter_and_loss, load_base
from loratune.workflows.train import train
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
IDS = torch.arange(40, 60)[None]


def test_eva_begins_with_the_directions_in_which_the_inputs_of_the_data_vary(tiny_recipe: MakeRecipe) -> None:
    prepared = prepare(tiny_recipe(lora__variant="eva"), NoProgress())
    model, _ = attach_adapter_and_loss(prepared, load_base(prepared, NoProgress()), NoProgress())
    layer = model.get_base_model().model.layers[0].self_attn
    base = AutoModelForCausalLM.from_pretrained(prepared.model.base.path, dtype=torch.float32)
    rows = torch.cat(
        [
            base.model.layers[0].input_layernorm(base.model.embed_tokens(torch.from_numpy(example.input_ids).long()))
            for example in prepared.data.train
        ]
    ).detach()
    directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh
    a = layer.q_proj.lora_A["default"].weight.detach()
    assert a.shape[0] == 4
    torch.testing.assert_close(layer.v_proj.lora_A["default"].weight.detach(), a, rtol=0, atol=0)
    # PEFT stops where directions move by less than a cosine of 0.99, and draws its decompositions
    inside = (a @ directions[:6].T).norm(dim=1)
    assert float(inside.min()) > 0.9
    assert float(layer.q_proj.lora_B["default"].weight.detach().abs().max()) == 0


def test_eva_says_how_many_tokens_it_needs_and_puts_as_many_into_each_batch() -> None:
    examples = [[1] * 5, [2] * 3, [3] * 9, [4] * 2]
    batches = batches_for_eva(examples, r=4, batch_size=1, device="cpu")
    assert [int(batch["attention_mask"].sum()) for batch in batches] == [8, 11]
    with pytest.raises(RecipeError, match="needs 60 tokens for rank 30, but the training data has 19"):
        batches_for_eva(examples, r=30, batch_size=8, device="cpu")


@pytest.mark.parametrize("variant", ["pissa", "eva", "loftq"])
def test_a_beginning_and_an_adapter_to_begin_with_contradict_each_other(variant: str, tiny_recipe: MakeRecipe) -> None:
    settings = {"lora__variant": variant, "lora__start_from": "elsewhere"}
    with pytest.raises(RecipeError, match=r"initializes A and B, but lora\.start_from"):
        tiny_recipe(**settings)


def test_what_cannot_begin_so_is_refused(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"lora\.rank_pattern is set"):
        tiny_recipe(lora__variant="eva", lora__rank_pattern={"q_proj": 2})
    with pytest.raises(RecipeError, match=r"set model\.quantization: nf4"):
        tiny_recipe(lora__variant="loftq")


def test_loftq_begins_nearer_to_the_weights_than_nf4_and_merges(
    tiny_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"lora__variant": "loftq", "model__quantization": "nf4", "lora__alpha": 24, "lora__r": 8}
    recipe = tiny_recipe(**settings)
    prepared = prepare(recipe, NoProgress())
    model, _ = attach_adapter_and_loss(prepared, load_base(prepared, NoProgress()), NoProgress())
    weights = load_file(tiny_model / "model.safetensors")
    for number in range(2):
        weight = weights[f"model.layers.{number}.self_attn.q_proj.weight"]
        layer = model.get_base_model().model.layers[number].self_attn.q_proj
        left = weight - as_multiplied(weight, "nf4", torch.float32)
        update = 3 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
        best = torch.linalg.svdvals(left)[8:].norm()
        assert float((left - update).norm()) == pytest.approx(float(best), rel=1e-3)
        assert float(best) < 0.8 * float(left.norm())
    run = train(recipe).run
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    last = [line["eval_nll"] for line in run.read_metrics() if "eval_nll" in line][-1]
    assert read_json(run.evaluation)["tuned"]["nll"] == pytest.approx(last, abs=1e-6)
    assert merge(run.root, tmp_path / "merged").certificate["passed"]


def test_modules_learn_at_rates_of_their_own_in_both_engines(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {
        "lora__modules_to_save": ["norm"],
        "train__learning_rate_pattern": {"norm": 1e-30, r"layers\.0\..*": 1e-3},
        "train__lora_plus_ratio": 4,
        "train__save_every": 2,
    }
    fast = train(tiny_recipe(**settings)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    saved = load_file(fast.adapter / "adapter_model.safetensors")
    base = load_file(Path(read_json(fast.lock)["recipe"]["model"]["name"]) / "model.safetensors")
    torch.testing.assert_close(saved["base_model.model.model.norm.weight"], base["model.norm.weight"], rtol=0, atol=0)
    state = json.loads((fast.checkpoints / "2" / "state.json").read_text())
    rates = sorted({group["initial_lr"] for group in state["optimizer"]["param_groups"] if group["params"]})
    assert rates == pytest.approx([1e-30, 1e-3, 4e-3, 1e-2, 4e-2])
    grown = [
        float(saved[f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_B.weight"].abs().max())
        for number in range(2)
    ]
    assert grown[0] < grown[1] / 4
    assert fast.read_metrics()[0]["learning_rate"] <= 1e-2


def test_a_rate_for_nothing_is_refused(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"train\.learning_rate_pattern: o_proj applies to none of the trained"):
        prepare(tiny_recipe(train__learning_rate_pattern={"o_proj": 1e-3}), NoProgress())
