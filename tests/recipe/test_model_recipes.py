"""The recipes for published models, on models of the published shapes: no weights, no hub."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from loratune.model.adapter.targets import resolve_targets
from loratune.planning.parameters import skeleton
from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError
from loratune.workflows.plan import plan
from loratune.workflows.tiny_model import conversation
from tests.conftest import some, write_jsonl
from tests.recipe.published import PUBLISHED, write_folder

RECIPES = {
    path.stem: path
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    if Recipe.load(path).model.name in PUBLISHED
}
SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ADAPTED = {
    "gpt-oss-20b": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi-4": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
}
"""Recipe → the matrices that it adapts in every layer, where they are not the usual seven."""


def test_every_family_has_a_recipe() -> None:
    assert {PUBLISHED[Recipe.load(path).model.name].model_type for path in RECIPES.values()} == {
        *("llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "gpt_oss")
    }
    assert {Recipe.load(path).model.name for path in RECIPES.values()} == set(PUBLISHED)


def model_of(recipe: Recipe) -> PreTrainedModel:
    return skeleton(PUBLISHED[recipe.model.name].config())


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_adapts_every_linear_layer_of_a_model_of_the_published_size(name: str) -> None:
    recipe = Recipe.load(RECIPES[name])
    model = model_of(recipe)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[recipe.model.name].parameters
    targets = resolve_targets(model, recipe.lora.targets)
    layers = model.config.get_text_config().num_hidden_layers
    assert Counter(target.rpartition(".")[2] for target in targets) == dict.fromkeys(
        ADAPTED.get(name, SEPARATE), layers
    )
    assert not any("vision" in target for target in targets)
    assert PUBLISHED[recipe.model.name].config().get_text_config().max_position_embeddings >= int(
        recipe.data.max_length
    )


@pytest.mark.parametrize("name", some(RECIPES, "qwen3-8b", "gemma-3-4b"))
def test_the_recipe_can_be_planned_as_lora_and_qlora(name: str, tmp_path: Path) -> None:
    """The verb itself, on a folder that holds everything but the numbers of the weights."""
    published = PUBLISHED[Recipe.load(RECIPES[name]).model.name]
    folder = write_folder(published, tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", [conversation(i) for i in range(40)])
    settings = [f"model.name={folder}", f"data.train={rows}", f"train.output_dir={tmp_path / 'run'}"]
    lora = plan(Recipe.load(RECIPES[name], settings), device="h100-80gb").as_plan()
    trained = lora["parameters"]["trainable"]
    assert lora["parameters"]["total"] == published.parameters + trained
    assert 0 < trained < 0.02 * published.parameters
    assert published.parameters * 2 < lora["memory"]["peak_bytes"] < 80e9, "bfloat16 weights"
    assert lora["data"]["num_examples"] == 38, "auto holds one conversation in twenty out"
    quantized = Recipe.load(RECIPES[name], [*settings, "model.quantization=nf4"])
    if published.quantization:
        with pytest.raises(RecipeError, match=r"already quantized \(mxfp4\)"):
            plan(quantized, device="h100-80gb")
        return
    qlora = plan(quantized, device="h100-80gb").as_plan()
    assert qlora["parameters"] == lora["parameters"]
    assert qlora["memory"]["weights_bytes"] < 0.55 * lora["memory"]["weights_bytes"]
