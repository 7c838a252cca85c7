"""Tied or not, finite or not: by the weights, whatever config.json says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LlamaConfig, LlamaForCausalLM

from loratune.model import weight_facts
from loratune.model.load import load_config, load_model, locate_model
from loratune.model.weight_facts import (
    check_finite,
    correct_dtype,
    correct_tied,
    correct_tied_as_loaded,
    first_not_finite,
    has_own_head,
    untie,
)
from loratune.recipe.recipe import ModelSection
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, whose head is tied."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, by: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    by(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()


def add_head_of_last_row(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 1e-6


def add_copy(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def add_head_of_a_bare_decoder(tensors: Tensors) -> None:
    add_head(tensors)
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("by", "own"),
    [
        (lambda _: None, False),
        (add_copy, False),
        (add_head, True),
        (add_head_of_last_row, True),
        (add_head_of_a_bare_decoder, True),
    ],
)
def test_a_head_in_the_files_decides_whether_it_is_tied(
    folder: Path, by: Callable[[Tensors], None], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_facts, "_ROWS_AT_A_TIME", 1000)
    change(folder, by)
    assert has_own_head(folder) is own
    config = AutoConfig.from_pretrained(folder)
    assert config.tie_word_embeddings
    correct_tied(config, folder)
    assert config.tie_word_embeddings is not own
    base = locate_model(ModelSection(name=str(folder)), NO_PROGRESS)
    assert load_config(base, ModelSection()).tie_word_embeddings is not own


def test_a_loaded_model_keeps_its_own_head_when_its_embedding_grows(folder: Path) -> None:
    change(folder, add_head)
    section = ModelSection(name=str(folder))
    model = load_model(locate_model(section, NO_PROGRESS), section, dtype=torch.float32, device="cpu")
    before = model.lm_head.weight.clone()
    model.resize_token_embeddings(len(before) + 3, mean_resizing=False)
    assert torch.equal(model.lm_head.weight[: len(before)], before)
    assert not torch.equal(model.lm_head.weight[: len(before)], model.model.embed_tokens.weight[: len(before)])


def test_a_loaded_models_tensors_correct_its_config_and_tied_ones_leave_it() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    correct_tied_as_loaded(model)
    assert model.config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    correct_tied_as_loaded(model)
    assert not model.config.tie_word_embeddings


def test_untying_reaches_the_text_part() -> None:
    from transformers import Gemma3Config

    config = Gemma3Config()
    untie(config)
    assert not config.tie_word_embeddings
    assert not config.text_config.tie_word_embeddings


def test_the_tied_names_of_transformers_causal_models_are_known() -> None:
    """A model whose head had another name would pass for tied."""
    unknown = set()
    for kind in list(MODEL_FOR_CAUSAL_LM_MAPPING.keys()):
        try:
            keys = MODEL_FOR_CAUSAL_LM_MAPPING[kind]._tied_weights_keys or {}
        except (ImportError, AttributeError):
            continue
        for head, embedding in keys.items():
            if "embed" in head or not head.endswith(".weight"):
                continue  # two embeddings, of encoder and decoder
            if not (weight_facts._is_part(head, weight_facts._HEADS) and weight_facts._is_embedding(embedding)):
                unknown.add((head, embedding))
    assert not unknown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", EMBEDDING])
def test_a_weight_that_is_not_finite_is_named(folder: Path, name: str, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    change(folder, spoil)
    section = ModelSection(name=str(folder))
    with pytest.raises(RecipeError, match=f"NaN or infinite, the first in {name}"):
        load_model(locate_model(section, NO_PROGRESS), section, dtype=torch.float32, device="cpu")
    assert first_not_finite(folder / "model.safetensors") == name


def test_a_weight_too_large_for_float16_is_told_from_a_damaged_one(folder: Path) -> None:
    def enlarge(tensors: Tensors) -> None:
        tensors["model.norm.weight"][3] = 70_000.0

    change(folder, enlarge)
    section = ModelSection(name=str(folder))
    base = locate_model(section, NO_PROGRESS)
    with pytest.raises(RecipeError, match=r"norm.weight overflows in float16: its largest value is 7e\+04") as error:
        load_model(base, section, dtype=torch.float16, device="cpu")
    assert error.value.fix.startswith("model.dtype=float32")
    check_finite(load_model(base, section, dtype=torch.bfloat16, device="cpu"), folder)
    assert first_not_finite(folder / "model.safetensors") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_is_that_of_most_of_the_weights(folder: Path, dtype: torch.dtype) -> None:
    def narrow(tensors: Tensors) -> None:
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].to(dtype)

    assert AutoConfig.from_pretrained(folder).dtype == torch.float32
    change(folder, narrow)
    config = load_config(locate_model(ModelSection(name=str(folder)), NO_PROGRESS), ModelSection())
    assert config.dtype == dtype
    for file in folder.glob("*.safetensors"):
        file.unlink()
    correct_dtype(config, folder)
    assert config.dtype == dtype, "without files, nothing is known"


def test_what_config_says_is_not_changed_on_the_disk(folder: Path) -> None:
    change(folder, add_head)
    load_config(locate_model(ModelSection(name=str(folder)), NO_PROGRESS), ModelSection())
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
