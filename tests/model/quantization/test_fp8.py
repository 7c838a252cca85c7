from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.device import check_fp8
from loratune.model.kernels.fp8_linear import Fp8Linear
from loratune.model.quantization.fp8 import quantize_frozen_layers
from loratune.planning.hardware.devices import find_device
from loratune.recipe.recipe import LoraSection, Recipe
from loratune.run.errors import MachineError, RecipeError
from loratune.workflows.plan import plan
from loratune.workflows.train import train

TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def test_frozen_layers_of_the_decoder_are_quantized_and_nothing_else(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = attach_adapter(base, LoraSection(r=4), TARGETS, base_name="tiny", seed=0)
    assert quantize_frozen_layers(model) == 2 * 7
    kinds = {name: type(module) for name, module in model.named_modules() if "proj" in name or "head" in name}
    quantized = {name for name, kind in kinds.items() if kind is Fp8Linear}
    assert all("lora" not in name and "head" not in name for name in quantized)
    assert any(name.endswith("q_proj.base_layer") for name in quantized)
    assert use_fast_layers(model) == 2


def test_a_model_without_bfloat16_layers_is_refused(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = attach_adapter(base, LoraSection(r=4), TARGETS, base_name="tiny", seed=0)
    with pytest.raises(RecipeError, match="no frozen bfloat16 linear layers"):
        quantize_frozen_layers(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have fp8")
def test_the_plan_refuses_machines_without_fp8(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(model__quantization="fp8", model__dtype="auto", train__device="auto")
    with pytest.raises(MachineError, match=r"Hopper.*this is the cpu"):
        plan(recipe)
    with pytest.raises(MachineError, match=r"this is a100-80gb"):
        plan(recipe, device="a100-80gb")
    assert plan(recipe, device="h100-80gb").recipe.model.dtype == "bfloat16"
    assert find_device("h200").has_fp8


def test_it_is_made_from_bfloat16(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="starts from bfloat16"):
        tiny_recipe(model__quantization="fp8", model__dtype="float32")


@pytest.mark.parametrize("engine", ["fast", pytest.param("trl", marks=pytest.mark.slow)])
def test_losses_are_near_those_of_bfloat16(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """The machine is not asked: torch computes the same products on a CPU, only slowly."""
    monkeypatch.setattr("loratune.planning.memory.quantized.check_fp8", lambda device: None)
    losses = {}
    for quantization in ("none", "fp8"):
        recipe = tiny_recipe(
            model__quantization=quantization,
            model__dtype="bfloat16",
            lora__targets="complete",
            train__engine=engine,
            train__output_dir=str(tmp_path / quantization),
        )
        metrics = train(recipe).run.read_metrics()
        losses[quantization] = [record["loss"] for record in metrics if "loss" in record]
    assert losses["fp8"] != losses["none"]
    assert losses["fp8"] == pytest.approx(losses["none"], rel=0.02)


def test_a_cpu_has_none() -> None:
    with pytest.raises(MachineError):
        check_fp8("cpu")
