"""Modules that are trained whole beside the adapter: counted, trained, saved, loaded by stock PEFT, merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from loratune.data.batch import collate
from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.model.adapter.attach import attach_adapter, trainable_parameters, use_fast_layers
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import LoraSection, Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.training.loss import SupervisedLoss
from loratune.workflows.export import export, merge
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import recipe_maker
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
IDS = torch.arange(40, 60)[None]
SETTINGS = {"lora__modules_to_save": ["lm_head", "norm", "layers.1.input_layernorm"], "train__learning_rate": 1e-3}
"""`norm` alone would be all norms to PEFT."""


@pytest.fixture(scope="session")
def untied_model(
    tiny_model: Path, smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["tied", pytest.param("untied", marks=pytest.mark.slow)])
def run(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    untied_model: Path,
    chat_files: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDir:
    folder = {"tied": tiny_model, "untied": untied_model}[request.param]
    make = recipe_maker(folder, chat_files, tmp_path_factory.mktemp("whole"))
    return train(make(**SETTINGS, train__save_every=2)).run


def base_of(run: RunDir) -> Path:
    return Path(read_json(run.lock)["recipe"]["model"]["name"])


def test_both_engines_train_the_same_and_a_resumed_run_goes_on(
    run: RunDir, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    stock = train(tiny_recipe(**SETTINGS, model__name=str(base_of(run)), train__engine="trl")).run
    assert_same(run, stock, tolerance=1e-5)
    killed = RunDir.open(shutil.copytree(run.root, tmp_path / "killed"))
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / "6")
    assert_same(run, resume(killed.root).run, tolerance=0)


def test_the_plan_counts_what_is_trained_and_what_is_saved(run: RunDir) -> None:
    parameters = read_json(run.plan)["parameters"]
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert parameters["adapter_bytes"] == 4 * sum(tensor.numel() for tensor in saved.values())
    kept = load_file(run.checkpoints / "6" / "adapter_model.safetensors")
    assert parameters["trainable"] == sum(tensor.numel() for tensor in kept.values())
    optimizer = load_file(run.checkpoints / "6" / "optimizer.safetensors")
    moments = sum(tensor.numel() for tensor in optimizer.values() if tensor.numel() > 1)
    assert read_json(run.plan)["memory"]["optimizer_bytes"] == 4 * moments
    tied = json.loads((base_of(run) / "config.json").read_text())["tie_word_embeddings"]
    names = {item["name"] for item in parameters["whole"]}
    assert names == {"model.embed_tokens" if tied else "lm_head", "model.norm", "model.layers.1.input_layernorm"}
    assert ("base_model.model.model.embed_tokens.weight" in saved) == tied
    assert len(saved) == 2 * 4 + 3 + tied


def test_stock_peft_and_the_merged_model_are_what_was_trained(run: RunDir, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_of(run), dtype=torch.float32)
    untouched = base(IDS).logits.detach()
    adapted = PeftModel.from_pretrained(base, str(run.adapter))
    with torch.no_grad():
        logits = adapted(IDS).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(IDS).logits, untouched, rtol=0, atol=0)
    evaluation = read_json(run.evaluation)
    assert evaluation["tuned"]["nll"] < evaluation["base"]["nll"] - 0.05
    before, trained = base.get_output_embeddings().original_module.weight, adapted.get_base_model().lm_head.weight
    assert float((trained - before).detach().abs().max()) > 1e-3
    merge(run.root, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    files = [load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "merged", base_of(run))]
    assert files[0] == files[1]
    with pytest.raises(RecipeError, match="vLLM cannot hold"):
        export(run.root, to="vllm", out=tmp_path / "vllm")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_stock_forward(tied: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    base = LlamaForCausalLM(config).to(dtype)
    lora = LoraSection(r=4, dropout=0.0, modules_to_save=("lm_head", "embed_tokens", "norm", "layers.0.mlp.up_proj"))
    targets = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    model = attach_adapter(base, lora, targets, base_name="tiny", seed=0)
    trained = trainable_parameters(model)
    assert len(trained) == 2 * 2 + (3 if tied else 4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for name, p in trained.items() if "modules_to_save" in name} == {wide}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(0, 97, (30,))

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.double() for name, parameter in trained.items() if parameter.grad is not None}

    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    stock = torch.nn.functional.cross_entropy(logits.to(wide), ids[1:], reduction="sum")
    expected = gradients(stock)
    use_fast_layers(model)
    example = Example(input_ids=ids.numpy(), supervised=(ids >= 0).numpy(), origin=Origin(file="", line=1))
    fast = SupervisedLoss(model).sum(collate([example]))
    actual = gradients(fast)
    assert actual.keys() == expected.keys() == trained.keys()
    # the loss itself is float32; bfloat16 rounds each product to 2^-8 in an order of its own
    tolerance = 2e-6 if dtype == torch.float64 else 2**-5
    assert fast.item() == pytest.approx(stock.item(), rel=tolerance)
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).norm() / gradient.norm()) < tolerance, name


@pytest.mark.slow
def test_in_bfloat16_small_steps_are_kept_and_what_is_saved_computes_the_same(
    tiny_recipe: MakeRecipe, tiny_model: Path
) -> None:
    run = train(tiny_recipe(**{**SETTINGS, "train__learning_rate": 1e-4}, model__dtype="bfloat16")).run
    before = load_file(tiny_model / "model.safetensors")["model.norm.weight"]
    after = load_file(run.adapter / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    assert 0 < float((after - before).abs().max()) < 2**-8, "a step that bfloat16 has no digit for beside 1"
    last = [line["eval_nll"] for line in run.read_metrics() if "eval_nll" in line][-1]
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16), str(run.adapter)
    )
    examples = prepare(Recipe.parse(read_json(run.lock)["recipe"]), NoProgress()).data.eval
    use_fast_layers(adapted)
    adapted.eval()
    losses = SupervisedLoss(adapted).per_token(collate(examples))
    assert float(losses.mean()) == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora__modules_to_save": ["nrom"]}, "nrom matches no module"),
        (
            {"lora__modules_to_save": ["q_proj"]},
            r"trains all of model.layers.0.self_attn.q_proj, but lora.targets adapts",
        ),
        ({"lora__modules_to_save": ["self_attn"]}, "lora.targets adapts"),
        ({"lora__modules_to_save": ["mlp", "up_proj"]}, "one inside the other"),
        ({"lora__modules_to_save": ["layers"], "lora__targets": ["up_proj"]}, "is a ModuleList"),
        ({"lora__modules_to_save": ["up_proj"], "model__quantization": "nf4"}, "which packs it"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(
    settings: dict[str, object], problem: str, tiny_recipe: MakeRecipe
) -> None:
    with pytest.raises(RecipeError, match=problem):
        prepare(tiny_recipe(**settings), NoProgress())


def test_training_goes_on_from_an_adapter_with_whole_modules(
    run: RunDir, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "model__name": str(base_of(run)), "lora__start_from": str(run.adapter)}
    short = {"train__epochs": 0.1, "train__learning_rate": 1e-30}
    still = train(tiny_recipe(**{**settings, **short})).run
    assert read_json(still.evaluation)["tuned"] == read_json(run.evaluation)["tuned"]
    settings["lora__modules_to_save"] = ["lm_head"]
    with pytest.raises(RecipeError, match=r"has .*norm.weight, trained in full, which the recipe does not train"):
        prepare(tiny_recipe(**settings), NoProgress())
