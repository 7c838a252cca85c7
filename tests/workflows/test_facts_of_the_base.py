"""Runs on bases whose config.json, index or tokenizer says another thing than their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from loratune.model.adapter.attach import attach_adapter
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.errors import RunError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.export import export, merge
from loratune.workflows.load import attach_adapter_and_loss, check_forward, load_base
from loratune.workflows.train import train

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Make = Callable[..., Recipe]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def give_own_head(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()
    save(tensors, folder)
    return tensors[HEAD]


@pytest.mark.parametrize("new_tokens", [pytest.param([], marks=pytest.mark.slow), ["<|tool|>"]])
def test_a_head_of_its_own_is_trained_merged_and_exported(
    folder: Path, tiny_recipe: Make, tmp_path: Path, new_tokens: list[str]
) -> None:
    head = give_own_head(folder)
    recipe = tiny_recipe(model__name=str(folder), lora__new_tokens=new_tokens, train__epochs=1, evaluate__metric="none")
    tables = prepare(recipe, NO_PROGRESS).adapter.parameters.outside
    assert tables == 2 * (head.numel() + len(new_tokens) * head.shape[1])
    run = train(recipe).run
    merge(run.root, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight[: len(head)], head)
    export(run.root, to="gguf", merged=True, outtype="f32", out=tmp_path / "gguf")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    assert "output.weight" in {tensor.name for tensor in GGUFReader(file).tensors}


@pytest.mark.slow
def test_two_sets_of_weights_are_named_and_the_loaded_one_is_merged(
    folder: Path, tiny_recipe: Make, tmp_path: Path
) -> None:
    own = load_file(folder / "model.safetensors")
    left = "model-00001-of-00001.safetensors"
    save_file({name: tensor + 0.5 for name, tensor in own.items()}, folder / left)
    index = {"metadata": {}, "weight_map": dict.fromkeys(own, left)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = tiny_recipe(model__name=str(folder), train__epochs=1, evaluate__metric="none")
    assert any(left in note for note in prepare(recipe, NO_PROGRESS).notes.warnings)
    merge(train(recipe).run.root, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*index*"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.model.norm.weight, own["model.norm.weight"])


def add_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.add_tokens(["<|x|>"])


def add_ordinary(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["<|x|>", "<|y|>"])


def add_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    """No model can answer with it, so no export must stop at it."""
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        pytest.param(add_pad, {"to": "gguf", "merged": True, "outtype": "f32"}, marks=pytest.mark.slow),
        (add_stop, {"to": "gguf", "merged": True, "outtype": "f16"}),
        pytest.param(add_stop, {}, marks=pytest.mark.slow),
        pytest.param(add_ordinary, {"to": "gguf"}, marks=pytest.mark.slow),
        pytest.param(add_pad, {"to": "ollama", "merged": True}, marks=pytest.mark.slow),
    ],
)
def test_tokens_without_a_row_are_left_out_of_an_export(
    folder: Path,
    tiny_recipe: Make,
    tmp_path: Path,
    change: Callable[[PreTrainedTokenizerBase], None],
    settings: dict[str, Any],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    run = train(tiny_recipe(model__name=str(folder), train__epochs=1, evaluate__metric="none")).run
    out = tmp_path / "out"
    exported = export(run.root, **settings, out=out) if settings else merge(run.root, out, dtype="float32")
    assert exported.certificate["verdict"] == "same"
    assert all(token < rows for token in exported.certificate["stop_tokens"]["ids"])
    for file in out.glob("*.gguf") if settings.get("merged") else ():
        reader = GGUFReader(file)
        tokens, pad = reader.get_field("tokenizer.ggml.tokens"), reader.get_field("tokenizer.ggml.padding_token_id")
        assert tokens is not None
        assert len(tokens.contents()) == rows
        assert pad is None or pad.contents() < rows


@pytest.mark.parametrize("engine", ["fast", "trl"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_forward_that_overflows_is_named_as_such(folder: Path, tiny_recipe: Make, engine: str, dtype: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:  # each weight fits float16, their product does not
        if name.endswith("norm.weight"):
            tensors[name] = torch.full_like(tensors[name], 3e4 if dtype == "float16" else 3e38)
    save(tensors, folder)
    recipe = tiny_recipe(model__name=str(folder), model__dtype=dtype, train__engine=engine, evaluate__metric="none")
    prepared = prepare(recipe, NO_PROGRESS)
    with pytest.raises(RunError, match=f"the base model's own forward gives NaN or infinity in {dtype}") as error:
        attach_adapter_and_loss(prepared, load_base(prepared, NO_PROGRESS), NO_PROGRESS)
    fix = "model.dtype=float32, or bfloat16" if dtype == "float16" else "choose another model"
    assert error.value.fix == fix


def test_an_adapter_that_overflows_is_told_from_the_base(tiny_recipe: Make) -> None:
    prepared = prepare(tiny_recipe(evaluate__metric="none"), NO_PROGRESS)
    base = load_base(prepared, NO_PROGRESS)
    model = attach_adapter(base, prepared.recipe.lora, prepared.adapter.targets, base_name="tiny", seed=0)
    check_forward(model, prepared.data.train, started=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(1e30)
    with pytest.raises(RunError, match=r"the base with the adapter of lora\.start_from gives NaN") as error:
        check_forward(model, prepared.data.train, started=True)
    assert error.value.fix == "choose another adapter"
