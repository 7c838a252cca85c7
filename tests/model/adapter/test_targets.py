"""Presets and names against the real module names of every architecture family."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import models as architectures

from loratune.model.adapter.targets import describe_targets, matrix, resolve_targets, target_notes, unreached_notes
from loratune.run.errors import RecipeError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
GPT2_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
OPT_SIZES = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}
MLA_SIZES = {
    **SIZES,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
QWEN_MOE_SIZES = {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

LLAMA_LIKE = {
    "minimal": "q_proj",
    "balanced": "q_proj v_proj",
    "attention": "q_proj k_proj v_proj o_proj",
    "complete": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
}
# Config class → its sizes, and the leaves that each preset must choose in every layer, written by hand.
FAMILIES: dict[str, tuple[dict[str, int], dict[str, str]]] = {
    "LlamaConfig": (SIZES, LLAMA_LIKE),
    "Qwen2Config": (SIZES, LLAMA_LIKE),
    "Qwen3Config": (SIZES, LLAMA_LIKE),
    "MistralConfig": (SIZES, LLAMA_LIKE),
    "GemmaConfig": (SIZES, LLAMA_LIKE),
    "Gemma2Config": (SIZES, LLAMA_LIKE),
    "Gemma3TextConfig": (SIZES, LLAMA_LIKE),
    "Phi3Config": (
        SIZES,
        {
            "minimal": "qkv_proj",
            "balanced": "qkv_proj",
            "attention": "qkv_proj o_proj",
            "complete": "qkv_proj o_proj gate_up_proj down_proj",
        },
    ),
    "PhiConfig": (
        SIZES,
        {
            "minimal": "q_proj",
            "balanced": "q_proj v_proj",
            "attention": "q_proj k_proj v_proj dense",
            "complete": "q_proj k_proj v_proj dense fc1 fc2",
        },
    ),
    "GPT2Config": (
        GPT2_SIZES,
        {
            "minimal": "attn.c_attn",
            "balanced": "attn.c_attn",
            "attention": "attn.c_attn attn.c_proj",
            "complete": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
        },
    ),
    "GPTNeoXConfig": (
        SIZES,
        {
            "minimal": "query_key_value",
            "balanced": "query_key_value",
            "attention": "query_key_value attention.dense",
            "complete": "query_key_value attention.dense dense_h_to_4h dense_4h_to_h",
        },
    ),
    "OPTConfig": (
        OPT_SIZES,
        {
            "minimal": "q_proj",
            "balanced": "q_proj v_proj",
            "attention": "q_proj k_proj v_proj out_proj",
            "complete": "q_proj k_proj v_proj out_proj fc1 fc2",
        },
    ),
    "FalconConfig": (
        SIZES,
        {
            "minimal": "query_key_value",
            "balanced": "query_key_value",
            "attention": "query_key_value self_attention.dense",
            "complete": "query_key_value self_attention.dense dense_h_to_4h dense_4h_to_h",
        },
    ),
    "BertConfig": (
        {**SIZES, "is_decoder": True},
        {
            "minimal": "attention.self.query",
            "balanced": "attention.self.query attention.self.value",
            "attention": "attention.self.query attention.self.key attention.self.value attention.output.dense",
            "complete": "attention.self.query attention.self.key attention.self.value attention.output.dense "
            "intermediate.dense 0.output.dense 1.output.dense",
        },
    ),
    "MixtralConfig": (
        {**SIZES, "num_local_experts": 4},
        {**LLAMA_LIKE, "complete": "q_proj k_proj v_proj o_proj"},
    ),
    "Qwen3MoeConfig": (QWEN_MOE_SIZES, {**LLAMA_LIKE, "complete": "q_proj k_proj v_proj o_proj"}),
    "Qwen2MoeConfig": (QWEN_MOE_SIZES, LLAMA_LIKE),
    "GptOssConfig": (
        {**SIZES, "num_local_experts": 4, "head_dim": 8},
        {**LLAMA_LIKE, "complete": "q_proj k_proj v_proj o_proj"},
    ),
    "DeepseekV3Config": (
        MLA_SIZES,
        {
            "minimal": "q_a_proj q_b_proj",
            "balanced": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
            "attention": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
            # PEFT takes gate_proj, up_proj and down_proj for the stacked experts here
            "complete": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        },
    ),
}


def model_of(config_class: str, **changes: float) -> PreTrainedModel:
    sizes = FAMILIES[config_class][0]
    config = getattr(architectures, config_class)(**{**sizes, **changes})
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("preset", ["minimal", "balanced", "attention", "complete"])
@pytest.mark.parametrize("config_class", FAMILIES)
def test_a_preset_becomes_the_matrices_of_the_architecture(config_class: str, preset: str) -> None:
    model = model_of(config_class)
    suffixes = tuple(FAMILIES[config_class][1][preset].split())
    expected = {name for name, _ in model.named_modules() if any(name.endswith(f".{suffix}") for suffix in suffixes)}
    names = resolve_targets(model, preset)
    assert set(names) == expected
    assert list(names) == sorted(names)
    assert all(any(name.endswith(f".{suffix}") for name in names) for suffix in suffixes)


@pytest.mark.parametrize("config_class", FAMILIES)
def test_presets_grow_and_complete_never_holds_embeddings_head_or_router(config_class: str) -> None:
    model = model_of(config_class)
    minimal, balanced, attention, complete = (
        set(resolve_targets(model, preset)) for preset in ("minimal", "balanced", "attention", "complete")
    )
    assert minimal <= balanced <= attention <= complete
    for name in complete:
        assert matrix(name, model.get_submodule(name)).d_out > 4, f"{name} looks like a router"
        assert model.get_submodule(name) is not model.get_output_embeddings()
        assert "embed" not in name


def test_the_vision_tower_of_a_multimodal_model_is_left_alone() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**SIZES, "num_hidden_layers": 1, "head_dim": 8}
    config = architectures.Gemma3Config(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert resolve_targets(model, "minimal") == ("model.language_model.layers.0.self_attn.q_proj",)
    assert not unreached_notes(model, resolve_targets(model, "complete"))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("out_proj",), ("fc1", "down_proj")])
def test_modules_of_a_tower_that_text_never_reaches_are_named(targets: tuple[str, ...]) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**SIZES, "num_hidden_layers": 1, "head_dim": 8}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architectures.Gemma3Config(text_config=text, vision_config=vision))
    names = resolve_targets(model, targets)
    inside = [name for name in names if name.startswith("model.vision_tower.")]
    (note,) = unreached_notes(model, names)
    assert len(inside) >= 3
    assert f"{len(inside)} modules of model.vision_tower, which text alone never reaches" in note
    assert "lora.layers='first 1'" in note
    assert not unreached_notes(model, [name for name in names if name not in inside])
    if targets != ("out_proj",):  # the decoder has none of that name
        assert not unreached_notes(model, resolve_targets(model, targets, "first 1"))


@pytest.mark.parametrize("name", ["LlamaConfig", "GPT2Config", "Qwen3MoeConfig"])
def test_a_model_of_text_alone_has_no_unreached_modules(name: str) -> None:
    sizes = {} if name == "GPT2Config" else {**SIZES, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(architectures, name)(**sizes))
    assert not unreached_notes(model, resolve_targets(model, "complete"))


def test_a_model_that_is_not_from_transformers_works_by_structure() -> None:
    attention = nn.ModuleDict({"wq": nn.Linear(8, 8), "wv": nn.Linear(8, 8)})
    layer = nn.ModuleDict({"attention": attention, "mlp": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))})
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer]), "head": nn.Linear(8, 64)})
    assert resolve_targets(model, "balanced") == ("blocks.0.attention.wq", "blocks.0.attention.wv")
    assert len(resolve_targets(model, "complete")) == 4


def test_experts_that_are_separate_modules_are_adapted_but_their_router_is_not() -> None:
    moe = nn.ModuleDict(
        {"gate": nn.Linear(8, 2), "experts": nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 8)}) for _ in range(2))}
    )
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"moe": moe})])})
    assert resolve_targets(model, "complete") == ("layers.0.moe.experts.0.w1", "layers.0.moe.experts.1.w1")


def test_names_match_as_in_peft_by_full_name_or_dotted_suffix() -> None:
    model = model_of("LlamaConfig")
    assert resolve_targets(model, ("mlp.gate_proj",)) == tuple(f"model.layers.{i}.mlp.gate_proj" for i in range(2))
    one = ("model.layers.1.self_attn.q_proj",)
    assert resolve_targets(model, one) == one
    both = resolve_targets(model, ("v_proj", "q_proj", "self_attn.q_proj"))
    assert both == resolve_targets(model, "balanced")


def test_names_that_match_nothing_are_all_named_with_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match="q_porj, w_value match no module") as error:
        resolve_targets(model_of("LlamaConfig"), ("q_porj", "k_proj", "w_value"))
    assert "k_proj" not in error.value.problem
    assert "q_proj" in error.value.fix


def test_a_name_unlike_any_gets_the_list_of_known_names() -> None:
    with pytest.raises(RecipeError) as error:
        resolve_targets(model_of("GPT2Config"), ("xyz",))
    assert error.value.fix == "known here: c_attn, c_proj, c_fc"


def test_a_part_of_a_name_is_no_suffix() -> None:
    with pytest.raises(RecipeError, match="proj matches no module"):
        resolve_targets(model_of("LlamaConfig"), ("proj",))


@pytest.mark.parametrize(
    ("name", "kind", "fix"),
    [
        ("embed_tokens", "Embedding", "leave it out"),
        ("input_layernorm", "LlamaRMSNorm", "leave it out"),
        ("mlp", "LlamaMLP", "name the matrices inside it: gate_proj, up_proj, down_proj"),
    ],
)
def test_only_linear_matrices_are_accepted(name: str, kind: str, fix: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} is a {kind}") as error:
        resolve_targets(model_of("LlamaConfig"), (name,))
    assert error.value.fix == fix


def test_the_output_head_is_refused_because_the_loss_takes_it_as_frozen() -> None:
    with pytest.raises(RecipeError, match="lm_head, the output head"):
        resolve_targets(model_of("LlamaConfig"), ("q_proj", "lm_head"))


def test_a_word_that_is_no_preset_and_an_empty_list_are_refused() -> None:
    model = model_of("LlamaConfig")
    with pytest.raises(RecipeError, match="'q_proj'") as error:
        resolve_targets(model, "q_proj")
    assert "[q_proj]" in error.value.fix
    with pytest.raises(RecipeError, match="empty list"):
        resolve_targets(model, ())


def test_a_preset_on_a_model_without_attention_is_refused_with_names_to_choose_from() -> None:
    config = architectures.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RecipeError, match="MambaForCausalLM has no query and value matrix") as error:
        resolve_targets(model, "balanced")
    assert "in_proj" in error.value.fix


def test_targets_are_described_in_words() -> None:
    llama = model_of("LlamaConfig", num_hidden_layers=28)
    assert describe_targets(llama, "balanced") == "q_proj, v_proj in 28 layers"
    complete = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj in 28 layers"
    assert describe_targets(llama, "complete") == complete
    assert describe_targets(llama, ("model.layers.3.mlp.up_proj", "k_proj")) == (
        "k_proj in 28 layers; up_proj in 1 of 28 layers"
    )
    gpt2 = model_of("GPT2Config")
    assert describe_targets(gpt2, "complete") == "c_attn, attn.c_proj, c_fc, mlp.c_proj in 2 layers"
    assert describe_targets(model_of("OPTConfig"), ("project_in",)) == "model.decoder.project_in"


def test_notes_tell_of_fused_matrices_frozen_experts_and_routers_and_nothing_else() -> None:
    assert target_notes(model_of("LlamaConfig"), "complete") == ()
    (fused,) = target_notes(model_of("Phi3Config"), "minimal")
    assert fused == ("fused qkv_proj: query cannot be adapted without key and value, so all of the matrix is adapted")
    assert target_notes(model_of("Phi3Config"), "attention") == ()
    router, experts = target_notes(model_of("MixtralConfig"), "complete")
    assert "(router_aux_loss_coef 0.001), is left out" in router
    assert "experts" in experts
    assert target_notes(model_of("MixtralConfig"), ("q_proj",)) == (router,)
    assert target_notes(model_of("MixtralConfig", router_aux_loss_coef=0.0), ("q_proj",)) == ()
    jitter = target_notes(model_of("MixtralConfig", router_jitter_noise=0.1), ("q_proj",))[1]
    assert "are random in training (router_jitter_noise 0.1)" in jitter


def test_layers_are_chosen_from_either_end_or_by_number() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architectures.LlamaConfig(**{**SIZES, "num_hidden_layers": 4}))

    def numbers(layers: str | tuple[int, ...]) -> list[int]:
        return sorted({int(name.split(".")[2]) for name in resolve_targets(model, "balanced", layers)})

    assert numbers("all") == [0, 1, 2, 3]
    assert numbers("first 2") == [0, 1]
    assert numbers("last 1") == [3]
    assert numbers((2, 0)) == [0, 2]
    assert describe_targets(model, "balanced", "last 3") == "q_proj, v_proj in 3 of 4 layers"
    for impossible in ("last 5", (4,), (-1,), ()):
        with pytest.raises(RecipeError, match="has 4 layers"):
            numbers(impossible)
