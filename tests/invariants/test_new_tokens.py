"""New tokens: added to the tokenizer, their rows trained, saved, loaded by stock PEFT, merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loratune.data.batch import collate
from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.evaluation.sampling import Sampling
from loratune.model.adapter.attach import attach_adapter, fallback_note, trainable_parameters, use_fast_layers
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import LoraSection, Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.training.loss import SupervisedLoss
from loratune.workflows.chat import open_chat
from loratune.workflows.export import export, merge, write_served_layout
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import conversation, recipe_maker, write_jsonl
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
TOKENS = ["<|tool|>", "<|unused|>"]


@pytest.fixture(scope="module")
def tool_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [conversation(i) for i in range(20)]
    for row in rows:
        row["messages"][1]["content"] = "<|tool|>" + row["messages"][1]["content"]  # type: ignore[index]
    return write_jsonl(tmp_path_factory.mktemp("tools") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def untied_with_room(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen2's: more rows than the tokenizer has tokens, and a head of its own."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("untied") / "model"))
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    config.vocab_size += 64
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["grown", pytest.param("room", marks=pytest.mark.slow)])
def run(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    untied_with_room: Path,
    tool_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDir:
    folder = {"grown": tiny_model, "room": untied_with_room}[request.param]
    make = recipe_maker(folder, (tool_file, tool_file), tmp_path_factory.mktemp("tokens"))
    return train(make(lora__new_tokens=TOKENS, train__save_every=2)).run


def recipe_of(run: RunDir, **train_section: object) -> Recipe:
    values = read_json(run.lock)["recipe"]
    values["train"] |= train_section
    return Recipe.parse(values)


def base_of(run: RunDir) -> Path:
    return Path(recipe_of(run).model.name)


def test_both_engines_train_the_same_and_a_resumed_run_goes_on(run: RunDir, tmp_path: Path) -> None:
    stock = train(recipe_of(run, engine="trl", share_prefixes=False, output_dir=str(tmp_path / "trl"))).run
    assert_same(run, stock, tolerance=1e-5)
    killed = RunDir.open(shutil.copytree(run.root, tmp_path / "killed"))
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / "6")
    assert_same(run, resume(killed.root).run, tolerance=0)


def test_the_plan_counts_the_rows_and_names_a_token_that_never_occurs(run: RunDir) -> None:
    plan, saved = read_json(run.plan), load_file(run.adapter / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in saved.items() if name.endswith("trainable_tokens_delta")}
    tied = json.loads((base_of(run) / "config.json").read_text())["tie_word_embeddings"]
    assert [tuple(tensor.shape) for tensor in rows.values()] == [(2, 32)] * (1 if tied else 2)
    assert plan["parameters"]["trainable"] == sum(tensor.numel() for tensor in saved.values())
    assert plan["parameters"]["adapter_bytes"] == 4 * plan["parameters"]["trainable"]
    base = sum(tensor.numel() for tensor in load_file(base_of(run) / "model.safetensors").values())
    grown = 2 * 32 if tied else 0
    assert plan["parameters"]["total"] - plan["parameters"]["trainable"] == base + grown
    assert any("<|unused|> occurs in no training example" in warning for warning in plan["warnings"])
    assert not any("<|tool|>" in warning for warning in plan["warnings"])


def test_the_tokens_are_one_token_each_and_their_rows_are_learned(run: RunDir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    (number,) = tokenizer("<|tool|>", add_special_tokens=False)["input_ids"]
    assert number == len(AutoTokenizer.from_pretrained(base_of(run)))
    assert tokenizer.decode([number], skip_special_tokens=True) == "<|tool|>"
    saved = load_file(run.adapter / "adapter_model.safetensors")
    rows = next(tensor for name, tensor in saved.items() if name.endswith("trainable_tokens_delta"))
    assert float((rows[0] - rows[1]).abs().max()) > 1e-2, "both began as the mean"
    evaluation = read_json(run.evaluation)
    assert evaluation["tuned"]["nll"] < evaluation["base"]["nll"] - 0.1


def test_stock_peft_and_the_merged_model_are_what_was_trained(run: RunDir, tmp_path: Path) -> None:
    """After the documented steps: the base, grown to the tokenizer's length where it is shorter, then the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    ids = torch.tensor([[*range(40, 60), *tokenizer.convert_tokens_to_ids(TOKENS), 70]])
    base = AutoModelForCausalLM.from_pretrained(base_of(run), dtype=torch.float32)
    if base.get_input_embeddings().weight.shape[0] < len(tokenizer):
        base.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, str(run.adapter)).eval()(ids).logits
    last = [line["eval_nll"] for line in run.read_metrics() if "eval_nll" in line][-1]
    assert read_json(run.evaluation)["tuned"]["nll"] == pytest.approx(last, abs=1e-5)
    merge(run.root, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    chat = open_chat(run.root, Sampling())
    with torch.no_grad():
        torch.testing.assert_close(chat.model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    if base.config.tie_word_embeddings:  # else it would cut off the rows that the model has to spare
        auto = AutoPeftModelForCausalLM.from_pretrained(run.adapter, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(auto(ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_carry_them_says_so(run: RunDir, tmp_path: Path) -> None:
    for to in ("vllm", "gguf"):
        with pytest.raises(RecipeError, match="trained in addition to the adapter") as error:
            export(run.root, to=to, out=tmp_path / to)
        assert "merge" in error.value.fix
    with pytest.raises(RecipeError, match="trained in addition to the adapter"):
        write_served_layout(run.root, tmp_path / "served")


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_stock_forward(tied: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    base = LlamaForCausalLM(config).double()
    lora = LoraSection(r=4, dropout=0.0, new_tokens=("a", "b", "c"))
    targets = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    state = torch.get_rng_state()
    model = attach_adapter(base, lora, targets, base_name="tiny", seed=0, new_tokens=(95, 98, 99))
    assert torch.equal(torch.get_rng_state(), state)
    trained = trainable_parameters(model)
    assert len(trained) == 2 * 2 + (1 if tied else 2)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.cat([torch.randint(0, 97, (30,)), torch.tensor([99, 5, 95, 99])])

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}

    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    stock = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    expected = gradients(stock)
    use_fast_layers(model)
    assert not fallback_note(model)
    torch.testing.assert_close(model(input_ids=ids[None], use_cache=False).logits[0, :-1], logits)
    with model.disable_adapter():
        alone = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    example = Example(input_ids=ids.numpy(), supervised=(ids >= 0).numpy(), origin=Origin(file="", line=1))
    loss = SupervisedLoss(model)
    fast = loss.sum(collate([example]))
    actual = gradients(fast)
    assert fast.item() == pytest.approx(stock.item(), rel=1e-6)
    assert actual.keys() == expected.keys() == trained.keys()
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).norm() / gradient.norm()) < 2e-6, name
    with model.disable_adapter():
        losses = torch.nn.functional.cross_entropy(alone, ids[1:], reduction="none").detach()
        torch.testing.assert_close(loss.per_token(collate([example])).double(), losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"lora__new_tokens": ["<|im_end|>"]}, "is already a token of this model"),
        ({"lora__new_tokens": ["x", "x"]}, "named twice"),
        ({"lora__new_tokens": ["a b"]}, "pattern"),
        ({"lora__new_tokens": ["<|a|>"], "lora__modules_to_save": ["lm_head"]}, "leave one of them out"),
        ({"lora__new_tokens": ["<|a|>"], "lora__start_from": "elsewhere"}, "remove one of them"),
    ],
)
def test_what_cannot_be_added_is_refused(settings: dict[str, object], problem: str, tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError) as error:
        prepare(tiny_recipe(**settings), NoProgress())
    assert problem in str(error.value)
