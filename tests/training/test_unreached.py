"""Trained parts that the data never reaches are named after the first step, and only these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, PreTrainedTokenizerBase

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.progress import NO_PROGRESS, NoProgress
from loratune.training.unreached import unreached_in_words, without_gradient
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import make_moe
from tests.invariants.families import config_of

MakeRecipe = Callable[..., Recipe]
ONE_EPOCH = {"train__epochs": 1, "evaluate__metric": "none"}


class Heard(NoProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def llama(**settings: object) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    return get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, **settings))


def backward(model: PeftModel) -> None:
    ids = torch.arange(10)[None]
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["v_proj"], "use_dora": True},
        {"target_modules": ["v_proj"], "trainable_token_indices": [50, 51]},
    ],
    ids=["plain", "whole", "dora", "tokens"],
)
def test_where_all_is_reached_nothing_is_named(settings: dict[str, object]) -> None:
    model = llama(**settings)
    assert without_gradient(model), "before the backward pass, nothing has a gradient"
    backward(model)
    assert without_gradient(model) == []


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_that_the_forward_skips_is_named(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(target_modules=["q_proj", "down_proj"])
    skipped = model.get_base_model().model.layers[layer]
    monkeypatch.setattr(skipped, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    backward(model)
    assert without_gradient(model) == [f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.mlp.down_proj"]


def test_gradients_of_zero_are_none_too() -> None:
    """As several processes add them up."""
    model = llama(target_modules=["q_proj"], modules_to_save=["norm"])
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    assert "model.norm" in without_gradient(model)
    assert len(without_gradient(model)) == 3 + 7, "three adapters, and every module that PEFT takes for a norm"


def lose_expert(folder: Path, layer: int, expert: int) -> None:
    """Make the router of a layer choose one expert for each token, and never this one."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    scores = tensors[f"model.layers.{layer}.mlp.gate.weight"]
    others = [row for row in range(len(scores)) if row != expert]
    scores[expert] = 0
    scores[others[1]] = -scores[others[0]]  # so one of the two is above zero
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def moe(smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    return make_moe(tmp_path / "moe", smollm2_tokenizer)


STACKS = {"lora__target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def named(run: RunDir) -> list[list[str]]:
    """The modules of each event, in the run's record."""
    return [line["modules"] for line in run.read_metrics() if line.get("event") == "unreached"]


@pytest.mark.parametrize(
    ("layer", "expert", "settings"),
    [
        (0, 2, {}),
        (1, 0, {"train__engine": "trl"}),
        pytest.param(1, 3, {"train__token_budget": 64, "train__save_every": 1}, marks=pytest.mark.slow),
    ],
    ids=["fast", "trl", "resumed"],
)
def test_an_expert_that_no_token_reaches_is_named_once(
    moe: Path, tiny_recipe: MakeRecipe, layer: int, expert: int, settings: dict[str, object]
) -> None:
    lose_expert(moe, layer, expert)
    heard = Heard()
    recipe = tiny_recipe(model__name=str(moe), **STACKS, **ONE_EPOCH, **settings)
    run = train(recipe, progress=heard).run
    name = f"model.layers.{layer}.mlp.experts[{expert}]"
    assert named(run) == [[name]]
    (warning,) = [text for text in heard.warnings if "no gradient in the first step" in text]
    assert name in warning
    assert "an expert may still be reached by later examples" in warning
    saved = load_file(run.adapter / "adapter_model.safetensors")
    for tensor in (tensor for key, tensor in saved.items() if f"layers.{layer}.mlp.experts" in key and "_B" in key):
        each = tensor.reshape(tensor.shape[0], -1, 4)
        assert [bool(each[..., number].any()) for number in range(4)] == [number != expert for number in range(4)]
    if "train__save_every" in settings:  # the first step is over, and what it found is in the record
        shutil.rmtree(run.adapter)
        shutil.rmtree(run.checkpoints / "3")
        assert named(resume(run.root).run) == [[name]]


@pytest.mark.parametrize(
    ("settings", "num_inside", "planned"),
    [
        pytest.param({"lora__targets": ["q_proj", "v_proj"]}, 2, True, marks=pytest.mark.slow),
        pytest.param(
            {"lora__targets": ["down_proj"], "lora__modules_to_save": ["layer_norm1"]}, 1, True, marks=pytest.mark.slow
        ),
        ({"lora__targets": "complete"}, 0, False),
    ],
    ids=["names", "whole", "preset"],
)
def test_a_vision_tower_is_named_before_training_and_after_the_first_step(
    smollm2_tokenizer: PreTrainedTokenizerBase,
    tiny_recipe: MakeRecipe,
    tmp_path: Path,
    settings: dict[str, object],
    num_inside: int,
    planned: bool,
) -> None:
    torch.manual_seed(0)
    config = config_of("Gemma 3", vocab_size=len(smollm2_tokenizer))
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    smollm2_tokenizer.save_pretrained(tmp_path / "model")
    recipe = tiny_recipe(model__name=str(tmp_path / "model"), **settings, **ONE_EPOCH)
    notes = [note for note in prepare(recipe, NO_PROGRESS).notes.warnings if "text alone never reaches" in note]
    assert len(notes) == planned
    assert all(f"{num_inside} modules of model.vision_tower" in note for note in notes)
    heard = Heard()
    run = train(recipe, progress=heard).run
    inside = [name for names in named(run) for name in names]
    assert len(inside) == num_inside
    assert all(name.startswith("model.vision_tower.") for name in inside)
    assert any("no gradient in the first step" in text for text in heard.warnings) is planned


def test_of_many_names_the_first_are_shown() -> None:
    text = unreached_in_words([f"layers.{number}.q_proj" for number in range(9)])
    assert "layers.3.q_proj and 5 more" in text
    assert "expert" not in text
    assert "experts[1];" in unreached_in_words(["mlp.experts[1]"])
