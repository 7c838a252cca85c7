"""Models published quantized: each trains alike in both engines, is planned, merges with a certificate, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, GptOssForCausalLM

from loratune.model.load import BaseModel, load_model
from loratune.model.quantization import checkpoint
from loratune.model.quantization.quantize import unpack_layers
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import ModelSection, Recipe
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.extras import pip_install
from loratune.run.progress import NoProgress
from loratune.workflows.export import export, merge
from loratune.workflows.guidance.eject import eject
from loratune.workflows.plan import plan
from loratune.workflows.train import train
from tests.conftest import some

MakeRecipe = Callable[..., Recipe]


# ---- checkpoints of each format, a few hundred kilobytes


def by_transformers(source: Path, folder: Path, settings: Any) -> None:
    """Quantized by transformers, and saved."""
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder)


def nf4(source: Path, folder: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    by_transformers(source, folder, settings)


def int8(source: Path, folder: Path) -> None:
    by_transformers(source, folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))


def torchao_int8(source: Path, folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    by_transformers(source, folder, TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False)))


def torchao_float8(source: Path, folder: Path) -> None:
    from torchao.quantization import Float8WeightOnlyConfig
    from transformers import TorchAoConfig

    by_transformers(source, folder, TorchAoConfig(Float8WeightOnlyConfig(set_inductor_config=False)))


def torchao_dynamic(source: Path, folder: Path) -> None:
    """Inputs are rounded as well."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    by_transformers(source, folder, TorchAoConfig(Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)))


def block_fp8(source: Path, folder: Path) -> None:
    """As DeepSeek-V3 and Qwen3-FP8 are stored: e4m3, and a scale for each block."""
    tensors, block = load_file(source / "model.safetensors"), 16
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors[name]
        blocks = weight.view(weight.shape[0] // block, block, weight.shape[1] // block, block)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(weight.shape)
        tensors[name.replace("weight", "weight_scale_inv")] = scale
    write(source, folder, tensors, {"quant_method": "fp8", "weight_block_size": [block, block]})


def compressed(source: Path, folder: Path, layout: str, settings: dict[str, Any]) -> None:
    """As llm-compressor stores it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings), format=layout)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors.pop(name)
        groups = weight.view(weight.shape[0], -1, settings.get("group_size") or weight.shape[1])
        largest = 448 if settings["type"] == "float" else 2 ** (settings["num_bits"] - 1) - 1
        parts = {"weight": weight, "weight_scale": groups.abs().amax(-1) / largest}
        made = BaseCompressor.get_value_from_registry(layout).compress(parts, scheme)
        tensors |= {name.replace("weight", part): value.contiguous() for part, value in made.items()}
    group = {"targets": ["Linear"], "weights": settings, "format": layout}
    config = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    write(source, folder, tensors, {**config, "config_groups": {"group_0": group}, "ignore": ["lm_head"]})


def compressed_int4(source: Path, folder: Path) -> None:
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    compressed(source, folder, "pack-quantized", settings)


def compressed_float8(source: Path, folder: Path) -> None:
    compressed(
        source, folder, "float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    )


def mxfp4(source: Path, folder: Path) -> None:
    """As gpt-oss is stored: the experts in blocks of 32 four-bit floats with an exponent each. Made at random."""
    tokens = AutoConfig.from_pretrained(source)
    config = GptOssConfig(
        vocab_size=tokens.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=draw
        )
        tensors[f"{name}_scales"] = torch.randint(
            121, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=draw
        )
    write(folder, folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def write(source: Path, folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


FORMATS = {
    "nf4": nf4,
    "int8": int8,
    "torchao_int8": torchao_int8,
    "torchao_float8": torchao_float8,
    "torchao_dynamic": torchao_dynamic,
    "block_fp8": block_fp8,
    "compressed_int4": compressed_int4,
    "compressed_float8": compressed_float8,
    "mxfp4": mxfp4,
}
ROWS = {
    "nf4": "bitsandbytes, 4 bits",
    "int8": "bitsandbytes, 8 bits",
    "torchao_int8": "torchao, int8 weights",
    "torchao_float8": "torchao, float8 weights",
    "torchao_dynamic": "torchao, int8 weights and inputs",
    "block_fp8": "fp8 in blocks (DeepSeek-V3, Qwen3-FP8)",
    "compressed_int4": "compressed-tensors, int4 in groups",
    "compressed_float8": "compressed-tensors, float8",
    "mxfp4": "mxfp4 (gpt-oss)",
}
"""What docs/quantization.md calls them."""
REFUSED = {"GPTQ", "AWQ", "torchao, int4 weights"}
PAGE = Path(__file__).parents[3] / "docs" / "quantization.md"
PACKED = ("nf4", "int8", "torchao_int8", "torchao_float8", "torchao_dynamic")
ROUNDS_INPUTS = ("int8", "torchao_dynamic")


@pytest.fixture(scope="session")
def quantized(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a checkpoint, once for each format."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            FORMATS[name](tiny_model, folder)
            made[name] = folder
        return made[name]

    return make


def loaded(folder: Path) -> torch.nn.Module:
    section = ModelSection(name=str(folder))
    return load_model(BaseModel(name=str(folder), path=folder), section, dtype=torch.float32, device="cpu")


def held_bytes(model: torch.nn.Module) -> int:
    """Of parameters, and what belongs to packed ones."""
    total = 0
    for parameter in model.parameters():
        state, parts = getattr(parameter, "quant_state", None), [parameter]
        if state is not None:
            parts += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        elif getattr(parameter, "SCB", None) is not None:
            parts.append(parameter.SCB)
        elif hasattr(parameter, "tensor_data_names"):
            names = [*parameter.tensor_data_names, *getattr(parameter, "optional_tensor_data_names", ())]
            parts = [part for name in names if (part := getattr(parameter, name)) is not None]
        total += sum(part.nbytes for part in parts)
    return total


# ---- what becomes of them


def test_the_page_has_a_row_for_each_and_no_other() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## Quantized checkpoints")[2]
    rows = dict(
        line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| ") and "| format" not in line
    )
    wanted = {f"| {row}": "packed" if name in PACKED else "expanded" for name, row in ROWS.items()}
    wanted |= {f"| {row}": "refused" for row in REFUSED}
    assert rows == wanted | {"| GGUF, Q4 to Q8": "expanded"}, "that of GGUF files: tests/model/test_load.py"


@pytest.mark.parametrize("name", some(FORMATS, "int8", "torchao_float8", "compressed_int4", "mxfp4"))
def test_the_plan_has_the_bytes_that_the_loaded_weights_take(
    tiny_recipe: MakeRecipe, quantized: Callable[[str], Path], name: str
) -> None:
    prepared = plan(tiny_recipe(model__name=str(quantized(name))))
    # names of types and shapes are stored beside the tables of bitsandbytes
    assert prepared.estimate.memory.weights_bytes == pytest.approx(held_bytes(loaded(quantized(name))), rel=0.01)
    assert ("layers stored quantized run uncompiled" in prepared.choices["train.compile"].reason) == (name in PACKED)
    if name == "torchao_float8":
        with pytest.raises(RecipeError, match=r"train\.compile is true, but layers stored quantized run uncompiled"):
            plan(tiny_recipe(model__name=str(quantized(name)), train__compile=True))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "mxfp4"])
def test_the_loaded_weights_are_near_to_those_before_quantization(
    tiny_model: Path, quantized: Callable[[str], Path], name: str
) -> None:
    """A scale in the wrong place would be far off: rounding to 4 bits leaves a tenth, to 8 bits a hundredth."""
    layer = "model.layers.1.mlp.down_proj"
    weight = loaded(tiny_model).get_submodule(layer).weight
    read = loaded(quantized(name)).get_submodule(layer)(torch.eye(weight.shape[1])).T
    assert 1e-4 < (read - weight).norm() / weight.norm() < (0.12 if name in ("nf4", "compressed_int4") else 0.04)


@pytest.mark.parametrize("name", PACKED)
def test_unpacked_layers_are_plain_and_have_the_values_of_training(quantized: Callable[[str], Path], name: str) -> None:
    model, ids = loaded(quantized(name)), torch.arange(3, 40)[None]
    kinds = {type(layer) for layer in model.modules() if isinstance(layer, torch.nn.Linear)}
    assert len(kinds) == 2, "the head and the packed ones"
    with torch.no_grad():
        packed = model(input_ids=ids).logits
        unpack_layers(model)
        plain = model(input_ids=ids).logits
    assert {type(layer) for layer in model.modules() if isinstance(layer, torch.nn.Linear)} == {torch.nn.Linear}
    far = 0.1 if name in ROUNDS_INPUTS else 1e-5
    assert (packed - plain).abs().max() < far * packed.abs().max()


@pytest.mark.parametrize("name", some(FORMATS, "compressed_int4"))
def test_both_engines_train_alike_and_the_merge_is_certified(
    tiny_recipe: MakeRecipe, quantized: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    losses = {}
    for engine in ("fast", "trl"):
        recipe = tiny_recipe(
            model__name=str(quantized(name)), train__engine=engine, train__output_dir=str(tmp_path / engine)
        )
        run = train(recipe).run
        losses[engine] = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert losses["fast"] == pytest.approx(losses["trl"], rel=5e-3 if name in ROUNDS_INPUTS else 2e-5)
    assert losses["fast"][-1] < losses["fast"][0]
    done = merge(tmp_path / "fast", tmp_path / "merged")
    assert done.certificate["passed"]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (done.certificate["tolerance"]["mean_kl"] > 1e-4) == (name in ROUNDS_INPUTS)
    if name == "compressed_int4":
        with pytest.raises(RunError, match=r"quanti[sz]ed \(compressed-tensors\)") as error:
            export(tmp_path / "fast", to="gguf", merged=True)
        assert "loratune merge" in str(error.value)


def test_no_script_is_made_for_a_quantized_checkpoint(
    tiny_recipe: MakeRecipe, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared = prepare(tiny_recipe(model__name=str(quantized("block_fp8")), train__epochs=1), NoProgress())
    with pytest.raises(RecipeError, match=r"are quantized \(fp8\)"):
        eject(prepared, tmp_path / "script.py", overwrite=False, progress=NoProgress())


@pytest.mark.slow
def test_eight_bits_of_bitsandbytes_are_planned_as_those_of_the_recipe(
    tiny_recipe: MakeRecipe, quantized: Callable[[str], Path]
) -> None:
    ours, theirs = plan(tiny_recipe(model__quantization="int8")), plan(tiny_recipe(model__name=str(quantized("int8"))))
    assert theirs.estimate.memory.activation_bytes == ours.estimate.memory.activation_bytes


def test_eight_bits_of_bitsandbytes_are_not_recomputed(
    tiny_recipe: MakeRecipe, quantized: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError, match=r"train\.recompute is 1, but the weights of .* keep their inputs"):
        plan(tiny_recipe(model__name=str(quantized("int8")), train__recompute=1))


def test_a_classifier_is_not_made_of_a_quantized_checkpoint(
    tiny_recipe: MakeRecipe, quantized: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError, match=r"are quantized \(fp8\)"):
        plan(tiny_recipe(model__name=str(quantized("block_fp8")), model__task="sequence_classification"))


def test_a_checkpoint_that_comes_quantized_is_not_quantized_again(
    tiny_recipe: MakeRecipe, quantized: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError, match="already quantized"):
        plan(tiny_recipe(model__name=str(quantized("nf4")), model__quantization="int8"))


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "pip install optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "pip install gptqmodel"),
        ({"quant_method": "compressed-tensors"}, pip_install("compressed-tensors")),
        ({"quant_method": "torchao"}, pip_install("torchao")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, pip_install("bitsandbytes")),
    ],
)
def test_a_checkpoint_whose_package_is_missing_is_refused_before_weights_load(
    tiny_recipe: MakeRecipe,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    missing: str,
) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match=str(settings["quant_method"])) as error:
        plan(tiny_recipe(model__name=str(claims(tiny_model, tmp_path, settings))))
    assert missing in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "needs optimum and gptqmodel: not installed"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "needs gptqmodel: not installed"),
        ({"quant_method": "unheard_of"}, "Unknown quantization type"),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {}}},
            },
            "cannot train an adapter on weights quantized by torchao",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_trained_here_is_refused_before_weights_load(
    tiny_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    with pytest.raises((MachineError, RecipeError), match=words):
        plan(tiny_recipe(model__name=str(claims(tiny_model, tmp_path, settings))))


def claims(tiny_model: Path, tmp_path: Path, settings: dict[str, object]) -> Path:
    """A folder whose config claims to be quantized."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder
