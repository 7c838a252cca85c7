"""A base in 4 or 8 bits: exact bytes, the same trajectory by both engines, and what is refused."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loratune.exporting.gguf.model import GgufSource, write_gguf_model
from loratune.exporting.merge_weights import write_merged
from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.load import BaseModel, load_config, load_model
from loratune.model.quantization import quantize
from loratune.model.quantization.kinds import BY_TORCHAO, PACKED
from loratune.model.quantization.quantize import as_multiplied, base_bytes, matrix_bytes, quantized_matrices
from loratune.planning.parameters import skeleton
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import LoraSection, ModelSection, Recipe
from loratune.run.errors import MachineError, RecipeError
from loratune.run.extras import pip_install
from loratune.run.progress import NoProgress
from loratune.workflows.certify_target import certify_target
from loratune.workflows.export import export, merge, write_served_layout
from loratune.workflows.finished import open_finished
from loratune.workflows.guidance.effects import SUMMARIES, TABLES
from loratune.workflows.guidance.eject import eject
from loratune.workflows.guidance.facts import Facts
from loratune.workflows.plan import plan
from loratune.workflows.train import train
from tests.conftest import some
from tests.workflows.guidance.test_eject import losses_of_script

MakeRecipe = Callable[..., Recipe]
TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def loaded(folder: Path, quantization: str, dtype: str = "float32") -> torch.nn.Module:
    section = ModelSection.model_validate({"name": str(folder), "quantization": quantization})
    return load_model(BaseModel(name=str(folder), path=folder), section, dtype=getattr(torch, dtype), device="cpu")


def held_bytes(layer: torch.nn.Module) -> int:
    weight = layer.weight
    if type(layer).__name__ == "PackedLinear":
        names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ())]
        return sum(part.nbytes for name in names if (part := getattr(weight, name)) is not None)
    if type(layer).__name__ == "Linear8bitLt":
        return weight.nbytes + weight.SCB.nbytes
    state = weight.quant_state
    tensors = (weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("quantization", PACKED)
def test_all_linear_layers_but_the_head_are_quantized_and_take_the_planned_bytes(
    tiny_model: Path, quantization: str
) -> None:
    model = loaded(tiny_model, quantization, "bfloat16")
    base = skeleton(load_config(BaseModel(name="tiny", path=tiny_model), ModelSection()), trust_remote_code=False)
    matrices = dict(quantized_matrices(base))
    layers = {
        n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt", "PackedLinear")
    }
    assert layers.keys() == matrices.keys()
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        assert held_bytes(layer) == matrix_bytes(quantization, *matrices[name].weight.shape, 2), name
    quantized_names = {f"{name}.weight" for name in layers}
    others = sum(p.nbytes for name, p in model.named_parameters() if name not in quantized_names)
    assert base_bytes(base, quantization, 2) == others + sum(map(held_bytes, layers.values()))


@pytest.mark.parametrize("quantization", PACKED)
def test_a_merged_weight_has_the_values_that_training_multiplied_with(tiny_model: Path, quantization: str) -> None:
    plain, model = (loaded(tiny_model, name) for name in ("none", quantization))
    layer = model.get_submodule(TARGETS[1])
    worth = as_multiplied(plain.get_submodule(TARGETS[1]).weight.detach(), quantization, torch.float32)
    # rows of the identity read the columns; 8-bit inputs hold 0 and 1 exactly
    read = layer(torch.eye(worth.shape[1])).T
    rounding = (worth - plain.get_submodule(TARGETS[1]).weight).abs().max()
    assert rounding > 1e-5
    assert (read - worth).abs().max() < (1e-4 if quantization in BY_TORCHAO else 0.02) * rounding


@pytest.mark.parametrize("quantization", ["nf4", *BY_TORCHAO])
def test_evaluation_before_training_leaves_gradients_to_the_inputs(tiny_model: Path, quantization: str) -> None:
    base = loaded(tiny_model, quantization, "bfloat16")
    model = attach_adapter(base, LoraSection(r=4), TARGETS, base_name="tiny", seed=0)
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


@pytest.mark.parametrize(
    ("quantization", "closeness"),
    some(
        [("nf4", 2e-5), ("int8", 5e-4), *((name, 2e-5) for name in BY_TORCHAO)],
        ("nf4", 2e-5),
        ("int4_weight_only", 2e-5),
    ),
)
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
        assert lock["versions"]["torchao" if quantization in BY_TORCHAO else "bitsandbytes"]
        assert f"on the base model in {quantization}" in (run.adapter / "README.md").read_text()
    assert losses["fast"] == pytest.approx(losses["trl"], rel=closeness)
    assert losses["fast"][-1] < losses["fast"][0]


@pytest.mark.parametrize("quantization", BY_TORCHAO)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_layers_are_torchaos_own_and_keep_nothing_unpacked(
    tiny_model: Path, quantization: str, dtype: str
) -> None:
    """Value and gradient equal torchao's own, by autograd, which keeps the unpacked weight."""
    layer = loaded(tiny_model, quantization, dtype).get_submodule(TARGETS[1])
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        y = layer(ours)
    assert not kept
    own = torch.nn.functional.linear(theirs, layer.weight)
    assert torch.equal(y, own)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(grad_y)
    own.backward(grad_y)
    closeness = 1e-6 if dtype == "float32" else 2**-6  # another order of rounding
    assert (ours.grad - theirs.grad).abs().max() <= closeness * theirs.grad.abs().max()


def test_four_bits_are_those_of_torchao(tiny_model: Path) -> None:
    """Each of the sixteen values, in both halves of a byte."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    from loratune.model.quantization.torchao import Int4Packed

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    theirs = IntxUnpackedToInt8Tensor.from_hp(weight, (1, 32), torch.int4)
    assert (
        set(theirs.qdata[:, ::2].unique().tolist()) == set(theirs.qdata[:, 1::2].unique().tolist()) == set(range(-8, 8))
    )
    assert torch.equal(Int4Packed.of(weight).dequantize(), theirs.dequantize())


def test_groups_that_do_not_fit_are_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=8))
    with pytest.raises(RecipeError, match=r"needs a multiple of 32 inputs, but model.layers.0.self_attn.q_proj has 16"):
        base_bytes(model, "int4_weight_only", 2)


def test_a_script_in_four_bits_of_torchao_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(model__quantization="int4_weight_only", train__engine="trl")
    with pytest.raises(RecipeError, match="transformers' Trainer refuses"):
        eject(prepare(recipe, NoProgress()), tmp_path / "script.py", overwrite=False, progress=NoProgress())


@pytest.mark.parametrize("quantization", some(["nf4", "int4_weight_only"], "nf4"))
def test_the_plan_knows_bytes_and_explains_them(tiny_recipe: MakeRecipe, quantization: str) -> None:
    whole, packed = (plan(tiny_recipe(model__quantization=name)) for name in ("none", quantization))
    assert packed.adapter.parameters == whole.adapter.parameters
    saved = sum(
        4 * d * k - matrix_bytes(quantization, d, k, 4) for d, k in 2 * [(32, 32), (16, 32), (16, 32), (32, 32)]
    )
    saved += sum(4 * d * k - matrix_bytes(quantization, d, k, 4) for d, k in 2 * [(64, 32), (64, 32), (32, 64)])
    assert whole.estimate.memory.weights_bytes - packed.estimate.memory.weights_bytes == saved
    assert packed.recipe.train.compile is False
    assert "uncompiled" in packed.choices["train.compile"].reason
    assert any(f"unpacking the {quantization} weights" in warning for warning in packed.notes.warnings)
    facts = Facts(packed)
    assert "in float32" in SUMMARIES["model.quantization"](facts)
    assert [row["quantization"] for row in TABLES["model.quantization"](facts)] == ["none", *PACKED]


def test_the_page_has_the_bytes_of_each() -> None:
    page = (Path(__file__).parents[3] / "docs" / "quantization.md").read_text(encoding="utf-8")
    for name in PACKED:
        assert f"| `{name}` | {matrix_bytes(name, 4096, 4096, 2) / 4096**2:.2f} |" in page


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__dtype": "float16"}, "model.dtype is float16"),
        ({"train__compile": True}, "run uncompiled"),
        ({"train__recompute": 1}, "gradient checkpointing cannot free"),
    ],
)
def test_settings_that_contradict_it_are_refused(
    tiny_recipe: MakeRecipe, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        tiny_recipe(model__quantization="int8", **settings)


@pytest.mark.parametrize(("quantization", "package"), [("nf4", "bitsandbytes"), ("int8_weight_only", "torchao")])
def test_without_the_package_the_plan_says_what_to_install(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, quantization: str, package: str
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match=f"{package} is not installed") as error:
        plan(tiny_recipe(model__quantization=quantization))
    assert pip_install(package) in str(error.value)
    plan(tiny_recipe(model__quantization=quantization), device="a100-80gb")  # it has to be there, not here


def test_apple_gpus_are_refused() -> None:
    with pytest.raises(MachineError, match="Apple GPU"):
        quantize.check_quantization("nf4", "mps", is_here=True)


def test_matrices_that_are_stored_transposed_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(RecipeError, match="stored transposed"):
        list(quantized_matrices(model))


# ---- out of a run


@pytest.mark.parametrize("quantization", some(PACKED, "nf4"))
def test_what_is_written_has_the_values_of_training(tiny_recipe: MakeRecipe, tmp_path: Path, quantization: str) -> None:
    run = train(tiny_recipe(model__quantization=quantization, lora__targets="complete")).run
    done = merge(run.root, tmp_path / "merged")
    assert done.certificate["passed"]
    programs = [export(run.root, to=program, out=tmp_path / program) for program in ("vllm", "mlx")]
    merged = export(run.root, to="gguf", merged=True, outtype="f32", out=tmp_path / "gguf-merged")
    adapter = export(run.root, to="gguf", out=tmp_path / "gguf")
    served = write_served_layout(run.root, tmp_path / "served")
    name = run.root.name
    assert {path.name for path in adapter.folder.iterdir()} == {
        f"{name}-lora.gguf", f"{name}-base-f32.gguf", "parity.json",
    }  # fmt: skip
    assert adapter.usage[0].startswith(f"llama-cli -m {adapter.folder / f'{name}-base-f32.gguf'} --lora ")
    for exported in programs:
        assert str(exported.folder / "base") in exported.usage[0]
    for exported in (merged, adapter, served, *programs):
        assert exported.certificate["verdict"] == "same", exported.certificate["reason"]
        assert exported.certificate["weights"]["problems"] == []
        assert exported.certificate["weights"]["num_unchanged"] > 0  # the base's values are part of the proof
    assert (served.folder / "models" / "base" / "model.safetensors").resolve().is_relative_to(served.folder)


@pytest.mark.slow
def test_the_base_as_downloaded_is_not_taken_for_that_of_training(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = train(tiny_recipe(model__quantization="nf4", train__epochs=1)).run
    exported = export(run.root, to="gguf", out=tmp_path / "gguf")
    (base,) = exported.folder.glob("*-base-*.gguf")
    finished = open_finished(run.root, NoProgress())
    plain = GgufSource(
        base=finished.base, config=finished.config, tokenizer=finished.prepared.model.tokenizer, name="plain",
        stop_token_ids=finished.stops,
    )  # fmt: skip
    write_gguf_model(plain, base, outtype="f32")
    certificate = certify_target(run.root, exported.folder / f"{run.root.name}-lora.gguf")
    assert certificate["verdict"] == "different"
    assert "tensors that the adapter does not change are not those of" in certificate["reason"]
    vllm = export(run.root, to="vllm", out=tmp_path / "vllm").folder
    write_merged(finished.base, {}, vllm / "base", dtype=torch.float32)
    assert "are not those of" in certify_target(run.root, vllm)["reason"]
    shutil.rmtree(vllm / "base")
    assert certify_target(run.root, vllm)["verdict"] == "same"  # on a base of training's values, written for it


@pytest.mark.parametrize("quantization", some([name for name in PACKED if name != "int4_weight_only"], "nf4"))
def test_the_ejected_script_trains_the_same(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    settings = {"model__quantization": quantization, "data__eval": "none", "train__epochs": 1, "train__log_every": 1}
    recipe = tiny_recipe(**settings, train__engine="trl")
    script = tmp_path / "script.py"
    eject(prepare(recipe, NoProgress()), script, overwrite=False, progress=NoProgress())
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    run = train(recipe).run
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert losses_of_script(Path(f"{recipe.train.output_dir}-ejected")) == losses
