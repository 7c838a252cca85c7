"""A model that is incomplete is told from the headers of its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loratune.model.safetensors_headers import INDEX, check_weights, weight_files_of, weight_index_of, weight_notes
from loratune.planning.parameters import skeleton
from loratune.run.errors import RecipeError


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return skeleton(AutoConfig.from_pretrained(tiny_model))


def split(folder: Path) -> tuple[Path, Path]:
    """The weights as two files with an index."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    parts = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    halves = names[::2], names[1::2]
    for part, half in zip(parts, halves, strict=True):
        save_file({name: tensors[name] for name in half}, part, metadata={"format": "pt"})
    weight_map = {name: part.name for part, half in zip(parts, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()
    return parts


def test_a_complete_model_passes_in_one_file_and_in_two(folder: Path, model: PreTrainedModel) -> None:
    check_weights(folder, model, quantized=False)
    split(folder)
    check_weights(folder, model, quantized=False)


def test_a_folder_without_weights_is_left_to_the_hub(tmp_path: Path, model: PreTrainedModel) -> None:
    check_weights(tmp_path, model, quantized=False)


def test_a_missing_file_is_named(folder: Path, model: PreTrainedModel) -> None:
    split(folder)[1].unlink()
    with pytest.raises(RecipeError, match="1 of 2 weight files are missing: model-00002-of-00002"):
        check_weights(folder, model, quantized=False)


def test_a_file_that_is_cut_short_is_told(folder: Path, model: PreTrainedModel) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(RecipeError, match=f"cut short: {len(whole) - 100:,} of {len(whole):,} bytes"):
        check_weights(folder, model, quantized=False)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x05\0\0\0\0\0\0\0hello"])
def test_a_file_that_is_none_is_told(folder: Path, model: PreTrainedModel, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(RecipeError, match="not a safetensors file") as error:
        check_weights(folder, model, quantized=False)
    assert error.value.place.endswith("model.safetensors")


def test_weights_of_another_size_are_told(folder: Path, model: PreTrainedModel) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(33)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RecipeError, match=r"model.norm.weight is 33 in the weights and 32 in config.json"):
        check_weights(folder, model, quantized=False)
    check_weights(folder, model, quantized=True)


def test_weights_that_lack_a_part_are_told(folder: Path, model: PreTrainedModel) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RecipeError, match="the rest would be random"):
        check_weights(folder, model, quantized=False)


def both(folder: Path) -> list[str]:
    """Put the files of another model, with their index, beside the model's own single file."""
    own = (folder / "model.safetensors").read_bytes()
    parts = split(folder)
    for part in parts:
        save_file({name: tensor + 1 for name, tensor in load_file(part).items()}, part, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(own)
    return [part.name for part in parts]


def loaded(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).model.norm.weight


@pytest.mark.parametrize("kind", ["single", "sharded", "both", "dead index", "named"])
def test_the_weight_files_are_those_that_transformers_loads(folder: Path, model: PreTrainedModel, kind: str) -> None:
    if kind == "sharded":
        split(folder)
    elif kind != "single":
        both(folder)
    if kind == "dead index":
        for part in folder.glob("model-*.safetensors"):
            part.unlink()
    if kind == "named":
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "transformers_weights": INDEX}))
    tensors = {name: tensor for file in weight_files_of(folder) for name, tensor in load_file(file).items()}
    assert torch.equal(tensors["model.norm.weight"], loaded(folder))
    check_weights(folder, model, quantized=False)
    assert (weight_index_of(folder) is not None) == (kind in ("sharded", "named"))
    assert len(weight_notes(folder)) == (kind in ("both", "named"))


def test_the_checked_file_is_the_loaded_one(folder: Path, model: PreTrainedModel) -> None:
    both(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RecipeError, match="cut short"):
        check_weights(folder, model, quantized=False)


def test_weights_that_transformers_would_not_find_are_told(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(RecipeError, match=r"transformers loads model.safetensors or model.safetensors.index.json"):
        weight_files_of(folder)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        loaded(folder)
