"""Every variant of the adapter, from the first step to the adapter that stock PEFT loads on the untouched base."""

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

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import VARIANTS, Recipe
from loratune.run.digest import file_sha256
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.export import merge
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import some
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
IDS = torch.arange(40, 60)[None]
OTHERS = [variant for variant in VARIANTS if variant not in ("plain", "loftq")]  # loftq: test_initial_adapters


def held_out_losses(run: RunDir) -> list[float]:
    return [line["eval_nll"] for line in run.read_metrics() if "eval_nll" in line]


@pytest.mark.parametrize("variant", some(OTHERS, "dora"))
def test_both_engines_take_the_same_steps_and_the_adapter_is_for_the_untouched_base(
    variant: str, tiny_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"lora__variant": variant, "lora__targets": "complete"}
    base_before = file_sha256(tiny_model / "model.safetensors")
    fast = train(tiny_recipe(**settings)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    assert file_sha256(tiny_model / "model.safetensors") == base_before

    # the loss that training ended with is the loss of what was saved, on the base as it was
    evaluation = read_json(fast.evaluation)
    assert evaluation["tuned"]["nll"] == pytest.approx(held_out_losses(fast)[-1], abs=1e-5)
    plain = read_json(train(tiny_recipe(train__output_dir=str(tmp_path / "plain"))).run.evaluation)
    assert evaluation["base"]["nll"] == pytest.approx(plain["base"]["nll"], abs=1e-6)
    assert evaluation["tuned"]["nll"] < evaluation["base"]["nll"] - 0.1

    # stock PEFT sees the same, merged or not
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    untouched = base(IDS).logits.detach()
    adapted = PeftModel.from_pretrained(base, str(fast.adapter))
    with torch.no_grad():
        logits = adapted(IDS).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(IDS).logits, untouched, rtol=0, atol=0)
    merge(fast.root, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert float((logits - untouched).abs().max()) > 0.1


@pytest.mark.parametrize("variant", some(OTHERS, "olora"))
def test_the_plan_counts_what_is_trained_and_what_is_saved(variant: str, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(lora__variant=variant, lora__targets="complete", train__epochs=0.4)
    prepared = prepare(recipe, NoProgress())
    run = train(recipe).run
    saved = sum(tensor.numel() for tensor in load_file(run.adapter / "adapter_model.safetensors").values())
    assert 4 * saved == prepared.adapter.parameters.adapter_bytes
    checkpoint = run.checkpoints / str(prepared.estimate.num_steps) / "adapter_model.safetensors"
    assert sum(tensor.numel() for tensor in load_file(checkpoint).values()) == prepared.adapter.parameters.trainable


@pytest.mark.parametrize("variant", some(OTHERS, "olora"))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    variant: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = {"lora__variant": variant, "lora__dropout": 0.1, "train__save_every": 2}
    whole = train(tiny_recipe(**settings)).run
    killed = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "part"))).run
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / "6")
    resumed = resume(killed.root).run
    assert_same(whole, resumed, tolerance=0)
    assert read_json(whole.evaluation) == read_json(resumed.evaluation)


def test_a_rank_that_a_matrix_does_not_have_is_refused(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"has at most rank 16, but lora\.r is 17"):
        prepare(tiny_recipe(lora__variant="pissa", lora__r=17), NoProgress())


def test_a_saved_adapter_of_a_changed_base_says_that_it_is_plain(tiny_recipe: MakeRecipe) -> None:
    run = train(tiny_recipe(lora__variant="pissa", train__epochs=0.4)).run
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 64, True)


def test_only_the_chosen_layers_are_trained_and_stock_peft_loads_them(
    tiny_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"lora__layers": "last 1", "lora__targets": "complete"}
    fast = train(tiny_recipe(**settings)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    names = load_file(fast.adapter / "adapter_model.safetensors")
    assert len(names) == 14
    assert all(".layers.1." in name for name in names)
    assert read_json(fast.plan)["parameters"]["trainable"] == sum(tensor.numel() for tensor in names.values())
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(fast.adapter))
    assert sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name) == sum(
        map(torch.numel, names.values())
    )
