"""A base in 4 or 8 bits: exact bytes, the same trajectory by both engines, and what is refused."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from loratune.delivery import export, merge
from loratune.errors import MachineError, RecipeError, RunError
from loratune.guidance.ejection import eject
from loratune.guidance.numbers import SUMMARIES, TABLES, Facts
from loratune.model import quantised
from loratune.model.adapter import attach_adapter, use_fast_layers
from loratune.model.load import BaseModel, load_config, load_model
from loratune.model.quantised import as_multiplied, base_bytes, matrix_bytes, quantised_matrices
from loratune.pipeline import plan, train
from loratune.planning.parameters import skeleton
from loratune.preparation import prepare
from loratune.progress import Silent
from loratune.recipe import LoraSection, ModelSection, Recipe
from tests.conftest import some
from tests.guidance.test_ejection import losses_of_script

MakeRecipe = Callable[..., Recipe]
KINDS = ("nf4", "int8")
TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def loaded(folder: Path, quantization: str, dtype: str = "float32") -> torch.nn.Module:
    section = ModelSection.model_validate({"name": str(folder), "quantization": quantization})
    return load_model(BaseModel(name=str(folder), path=folder), section, dtype=getattr(torch, dtype), device="cpu")


def held_bytes(layer: torch.nn.Module) -> int:
    weight = layer.weight
    if type(layer).__name__ == "Linear8bitLt":
        return weight.nbytes + weight.SCB.nbytes
    state = weight.quant_state
    tensors = (weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("quantization", KINDS)
def test_all_linear_layers_but_the_head_are_quantised_and_take_the_planned_bytes(
    tiny_model: Path, quantization: str
) -> None:
    model = loaded(tiny_model, quantization, "bfloat16")
    base = skeleton(load_config(BaseModel(name="tiny", path=tiny_model), ModelSection()), trust_remote_code=False)
    matrices = dict(quantised_matrices(base))
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert layers.keys() == matrices.keys()
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        assert held_bytes(layer) == matrix_bytes(quantization, *matrices[name].weight.shape), name
    quantised_names = {f"{name}.weight" for name in layers}
    others = sum(p.nbytes for name, p in model.named_parameters() if name not in quantised_names)
    assert base_bytes(base, quantization, 2) == others + sum(map(held_bytes, layers.values()))


@pytest.mark.parametrize("quantization", KINDS)
def test_a_merged_weight_has_the_values_that_training_multiplied_with(tiny_model: Path, quantization: str) -> None:
    plain, model = (loaded(tiny_model, name) for name in ("none", quantization))
    layer = model.get_submodule(TARGETS[1])
    worth = as_multiplied(plain.get_submodule(TARGETS[1]).weight.detach(), quantization, torch.float32)
    # rows of the identity read the columns; 8-bit inputs hold 0 and 1 exactly
    read = layer(torch.eye(worth.shape[1])).T
    rounding = (worth - plain.get_submodule(TARGETS[1]).weight).abs().max()
    assert (read - worth).abs().max() < 0.02 * rounding


def test_evaluation_before_training_leaves_gradients_to_the_inputs(tiny_model: Path) -> None:
    model = attach_adapter(loaded(tiny_model, "nf4", "bfloat16"), LoraSection(r=4), TARGETS, base_name="tiny", seed=0)
    assert use_fast_layers(model) == 2
    ids = torch.arange(3, 20)[None]
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    first = [p for name, p in model.named_parameters() if "layers.0" in name and "lora_B" in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in first)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_tokens_int8_result_does_not_depend_on_the_others(tiny_model: Path) -> None:
    layer = loaded(tiny_model, "int8").get_submodule(TARGETS[0])
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0))
    x[5, 3] = 100.0  # an outlier, which bitsandbytes by default gives its column a product of its own
    assert torch.equal(layer(x)[:5], layer(x[:5]))


@pytest.mark.parametrize(("quantization", "closeness"), [("nf4", 2e-5), ("int8", 5e-4)])
def test_both_engines_take_the_same_steps(
    tiny_recipe: MakeRecipe, tmp_path: Path, quantization: str, closeness: float
) -> None:
    """int8 rounds inputs to 255 values: a difference in the last bit of float32 now and then becomes one of them."""
    losses = {}
    for engine in ("fast", "trl"):
        recipe = tiny_recipe(
            model__quantization=quantization,
            lora__targets="complete",
            train__engine=engine,
            train__output_dir=str(tmp_path / engine),
        )
        run = train(recipe).run
        losses[engine] = [line["loss"] for line in run.read_metrics() if "loss" in line]
        lock = json.loads(run.lock.read_text())
        assert lock["recipe"]["model"]["quantization"] == quantization
        assert lock["versions"]["bitsandbytes"]
        assert f"on the base in {quantization}" in (run.adapter / "README.md").read_text()
    assert losses["fast"] == pytest.approx(losses["trl"], rel=closeness)
    assert losses["fast"][-1] < losses["fast"][0]


def test_the_plan_knows_bytes_and_explains_them(tiny_recipe: MakeRecipe) -> None:
    whole, packed = (plan(tiny_recipe(model__quantization=name)) for name in ("none", "nf4"))
    assert packed.parameters == whole.parameters
    saved = sum(4 * d * k - matrix_bytes("nf4", d, k) for d, k in 2 * [(32, 32), (16, 32), (16, 32), (32, 32)])
    saved += sum(4 * d * k - matrix_bytes("nf4", d, k) for d, k in 2 * [(64, 32), (64, 32), (32, 64)])
    assert whole.memory.weights_bytes - packed.memory.weights_bytes == saved
    assert packed.recipe.train.compile is False
    assert "uncompiled" in packed.choices["train.compile"].reason
    assert any("unpacking the nf4 weights" in warning for warning in packed.warnings)
    facts = Facts(packed)
    assert "of float32" in SUMMARIES["model.quantization"](facts)
    assert [row["quantization"] for row in TABLES["model.quantization"](facts)] == ["none", "nf4", "int8"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__dtype": "float16"}, "not float16"),
        ({"train__compile": True}, "run uncompiled"),
        ({"train__recompute": 1}, "recomputing cannot free"),
    ],
)
def test_settings_that_contradict_it_are_refused(
    tiny_recipe: MakeRecipe, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        tiny_recipe(model__quantization="int8", **settings)


def test_without_bitsandbytes_the_plan_says_what_to_install(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="bitsandbytes is not installed") as error:
        plan(tiny_recipe(model__quantization="nf4"))
    assert "pip install 'loratune[bitsandbytes]'" in str(error.value)
    plan(tiny_recipe(model__quantization="nf4"), device="a100-80gb")  # it has to be there, not here


def test_apple_gpus_are_refused() -> None:
    with pytest.raises(MachineError, match="Apple GPU"):
        quantised.check_quantization("nf4", "mps", is_here=True)


def test_matrices_that_are_stored_transposed_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(RecipeError, match="stored transposed"):
        list(quantised_matrices(model))


# ---- out of a run


@pytest.mark.parametrize("quantization", some(KINDS, "nf4"))
def test_merging_writes_what_was_trained_and_other_ways_out_are_refused(
    tiny_recipe: MakeRecipe, tmp_path: Path, quantization: str
) -> None:
    run = train(tiny_recipe(model__quantization=quantization, lora__targets="complete")).run
    done = merge(run.root, tmp_path / "merged")
    assert done.certificate["passed"]
    for to in ("vllm", "gguf"):
        with pytest.raises(RecipeError, match=f"trained on a base in {quantization}"):
            export(run.root, to=to)


@pytest.mark.parametrize("quantization", some(KINDS, "nf4"))
def test_the_ejected_script_trains_the_same(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    settings = {"model__quantization": quantization, "data__eval": "none", "train__epochs": 1, "train__log_every": 1}
    recipe = tiny_recipe(**settings, train__engine="trl")
    script = tmp_path / "script.py"
    eject(prepare(recipe, Silent()), script, overwrite=False, progress=Silent())
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    run = train(recipe).run
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert losses_of_script(Path(f"{recipe.train.output_dir}-ejected")) == losses


# ---- checkpoints that come quantised


@pytest.fixture
def quantised_folder(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    ).save_pretrained(folder)
    return folder


def test_a_checkpoint_in_4_bits_trains_and_is_not_merged_into(
    tiny_recipe: MakeRecipe, quantised_folder: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(model__name=str(quantised_folder))
    prepared = plan(recipe)
    held = loaded(quantised_folder, "none")
    weights = sum(p.nbytes for name, p in held.named_parameters() if "proj" not in name)
    weights += sum(held_bytes(m) for m in held.modules() if type(m).__name__ == "Linear4bit")
    assert prepared.memory.weights_bytes == pytest.approx(weights, rel=0.01), "names of its tables are stored as well"
    assert "uncompiled" in prepared.choices["train.compile"].reason
    with pytest.raises(RecipeError, match=r"train\.compile is true, but layers that come quantised run uncompiled"):
        plan(tiny_recipe(model__name=str(quantised_folder), train__compile=True))
    run = train(recipe).run
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    with pytest.raises(RunError, match="quantised"):
        merge(run.root, tmp_path / "merged")


def test_a_checkpoint_that_comes_quantised_is_not_quantised_again(
    tiny_recipe: MakeRecipe, quantised_folder: Path
) -> None:
    with pytest.raises(RecipeError, match="come quantised"):
        plan(tiny_recipe(model__name=str(quantised_folder), model__quantization="int8"))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    ],
)
def test_a_checkpoint_whose_package_is_missing_is_refused_before_weights_load(
    tiny_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises((MachineError, RecipeError), match=str(settings["quant_method"])):
        plan(tiny_recipe(model__name=str(folder)))
