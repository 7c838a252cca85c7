from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.model.adapter.attach import attach_adapter, save_adapter, trainable_parameters
from loratune.model.adapter.start_from import check_adapter, load_weights_into, locate_adapter
from loratune.model.adapter.targets import matrix, resolve_targets
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError
from tests.model.adapter.test_attach import tiny

LORA = LoraSection(r=4, alpha=8)


def test_an_adapter_is_loaded_as_it_was_saved_or_refused_by_what_differs(tmp_path: Path) -> None:
    base = tiny()
    targets = resolve_targets(base, "balanced")
    matrices = [matrix(name, base.get_submodule(name)) for name in targets]
    saved = attach_adapter(base, LORA, targets, base_name="tiny", seed=1)
    for parameter in trainable_parameters(saved).values():
        torch.nn.init.normal_(parameter)
    save_adapter(saved, tmp_path / "adapter")
    folder = locate_adapter(str(tmp_path / "adapter"))

    check_adapter(folder, LORA, matrices)
    fresh = attach_adapter(tiny(), LORA, targets, base_name="tiny", seed=2)
    load_weights_into(fresh, folder)
    for one, other in zip(trainable_parameters(saved).values(), trainable_parameters(fresh).values(), strict=True):
        assert torch.equal(one, other)

    with pytest.raises(RecipeError, match=r"lora\.r is 8, but the adapter of lora\.start_from has 4"):
        check_adapter(folder, LORA.model_copy(update={"r": 8}), matrices)
    with pytest.raises(RecipeError, match="which the recipe does not train"):
        check_adapter(folder, LORA, matrices[:-1])


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no adapter_config\.json in it"):
        locate_adapter(str(tmp_path))
    with pytest.raises(RecipeError, match="no such folder"):
        locate_adapter(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("base_model.model.", "base_model.model._orig_mod.", "saved from a compiled model"),
        (".self_attn.", ".self_attn._orig_mod.", "saved from a compiled model"),
        (".lora_A.", ".lora_A.default.", "names that PEFT has in memory"),
        ("q_proj", "other_proj", "lacks model.layers.0"),
    ],
)
def test_an_adapter_with_names_of_the_memory_is_told_from_one_of_other_modules(
    tmp_path: Path, ours: str, theirs: str, said: str
) -> None:
    base = tiny()
    targets = resolve_targets(base, "balanced")
    matrices = [matrix(name, base.get_submodule(name)) for name in targets]
    save_adapter(attach_adapter(base, LORA, targets, base_name="tiny", seed=1), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {
        name.replace(ours, theirs).replace("lora_B.", "lora_B.default." if "default" in theirs else "lora_B."): t
        for name, t in tensors.items()
    }
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match=said) as error:
        check_adapter(tmp_path, LORA, matrices)
    assert ("lora.targets" in error.value.fix) == (said.startswith("lacks"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_adapter_with_weights_that_are_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    base = tiny()
    targets = resolve_targets(base, "balanced")
    matrices = [matrix(name, base.get_submodule(name)) for name in targets]
    saved = attach_adapter(base, LORA, targets, base_name="tiny", seed=1)
    name, parameter = list(trainable_parameters(saved).items())[1]
    with torch.no_grad():
        parameter[0, -1] = value
    save_adapter(saved, tmp_path / "adapter")
    with pytest.raises(RecipeError, match="weights that are NaN or infinite, the first in ") as error:
        check_adapter(tmp_path / "adapter", LORA, matrices)
    assert name.removeprefix("base_model.model.").replace(".default", "") in str(error.value)
