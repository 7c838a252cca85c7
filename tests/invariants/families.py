"""A tiny random model of every family that people fine-tune, and what loratune does with it.

`examine` finds out a row of docs/architectures.md. docs/make_architectures.py writes the page with it, test_families.py
compares the page with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from loratune.data.batch import collate
from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.exporting.adapter_matrices import read_adapter
from loratune.exporting.gguf.architectures import family_of
from loratune.exporting.merge_weights import write_merged
from loratune.exporting.vllm import check_vllm
from loratune.model.adapter.attach import attach_adapter, save_adapter, trainable_parameters
from loratune.model.adapter.module_roles import PRESET_ROLES
from loratune.model.adapter.targets import resolve_targets
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError
from loratune.training.loss import make_loss

COMMON: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6}
GEMMA = {"head_dim": 8, **WINDOW}
HALF_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
}
DELTA = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, 3": ("llama", {}),
    "Llama 4": ("llama4", {}),
    "Llama 4 (text)": (
        "llama4_text",
        {
            **EXPERTS,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
            "floor_scale": 4,
        },
    ),
    "Qwen2, 2.5": ("qwen2", {}),
    "Qwen2 MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Qwen3 MoE": ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "Qwen3-Next": ("qwen3_next", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "Qwen3.5": ("qwen3_5", {}),
    "Qwen3.5 (text)": ("qwen3_5_text", DELTA),
    "Qwen3.5 MoE (text)": ("qwen3_5_moe_text", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "Mistral": ("mistral", WINDOW),
    "Ministral": ("ministral", {**WINDOW, **HALF_FULL, "head_dim": 8}),
    "Ministral 3": (
        "ministral3",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.5,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "Mixtral": ("mixtral", {**EXPERTS, **WINDOW}),
    "Gemma": ("gemma", {"head_dim": 8}),
    "Gemma 2": (
        "gemma2",
        {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "Gemma 3": ("gemma3", {"mm_tokens_per_image": 4}),
    "Gemma 3 (text)": ("gemma3_text", {**GEMMA, **HALF_FULL, "query_pre_attn_scalar": 8}),
    "Gemma 3n (text)": (
        "gemma3n_text",
        {
            **GEMMA,
            **HALF_FULL,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": 48,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    "Gemma 4": ("gemma4", {}),
    "Gemma 4 (text)": (
        "gemma4_text",
        {
            **GEMMA,
            **HALF_FULL,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "Gemma 4 MoE (text)": (
        "gemma4_text",
        {
            **GEMMA,
            **HALF_FULL,
            **EXPERTS,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "attention_k_eq_v": True,
        },
    ),
    "Phi 1, 2": ("phi", {"num_key_value_heads": 4}),
    "Phi 3, 4": ("phi3", {"sliding_window": None}),
    "Phi 3.5 MoE": ("phimoe", {**EXPERTS, "sliding_window": None}),
    "OLMo": ("olmo", {"clip_qkv": 1.0}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {**WINDOW, **HALF_FULL}),
    "OLMoE": ("olmoe", EXPERTS),
    "Granite": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "Granite MoE": ("granitemoe", {**EXPERTS, "logits_scaling": 4.0}),
    "Granite 4 (hybrid)": (
        "granitemoehybrid",
        {
            **EXPERTS,
            **MAMBA2,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 32,
            "logits_scaling": 4.0,
        },
    ),
    "SmolLM3": ("smollm3", {}),
    "GPT-2": ("gpt2", GPT2),
    "GPT-2 without dropout": ("gpt2", {**GPT2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "GPT-NeoX": ("gpt_neox", {}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "Falcon": ("falcon", {}),
    "Falcon (alibi)": ("falcon", {"alibi": True}),
    "Falcon H1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "Cohere (Command R)": ("cohere", {"logit_scale": 0.3}),
    "Cohere 2": ("cohere2", {**WINDOW, **HALF_FULL, "logit_scale": 0.3}),
    "DeepSeek V2": ("deepseek_v2", {**DEEPSEEK, "topk_method": "greedy"}),
    "DeepSeek V3, R1": ("deepseek_v3", DEEPSEEK),
    "gpt-oss": ("gpt_oss", {**EXPERTS, **GEMMA, **HALF_FULL}),
    "GLM 4": ("glm4", {"head_dim": 8}),
    "GLM 4 MoE": ("glm4_moe", {**DEEPSEEK, "num_key_value_heads": 2, "head_dim": 8}),
    "Jamba": (
        "jamba",
        {
            **EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "Bamba": ("bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    "Zamba 2": (
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "use_mamba_kernels": False,
            "num_key_value_heads": 4,
            "num_mem_blocks": 1,
        },
    ),
    "Nemotron-H": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "head_dim": 8,
            "use_mamba_kernels": False,
            "num_hidden_layers": 3,
        },
    ),
    "LFM 2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Mamba": ("mamba", {"state_size": 4}),
    "Mamba 2": (
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    ),
}


COMPOSITE = {"gemma3", "gemma4", "llama4", "qwen3_5"}
"""Model types with towers for images beside the language model, which alone is trained."""
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
BY_HAND: dict[str, tuple[str, ...]] = {"Mamba": ("in_proj", "x_proj"), "Mamba 2": ("in_proj",)}
"""What is adapted where the presets find nothing."""
RANDOM = {"GPT-2", "Phi 3.5 MoE"}
"""Random in training, as published: compared in evaluation mode."""


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model; a new one each time, because models keep their attention in it."""
    model_type, own = CONFIGS[name]
    if "vocab_size_per_layer_input" in (own | CONFIGS.get(f"{name} (text)", ("", {}))[1]) and "vocab_size" in changes:
        changes["vocab_size_per_layer_input"] = changes["vocab_size"]
    if model_type not in COMPOSITE:
        common = {key: value for key, value in COMMON.items() if "mamba" not in model_type or "heads" not in key}
        return CONFIG_MAPPING[model_type](**{**common, **own, **changes})
    text_type, text = CONFIGS[f"{name} (text)"]
    towers = {"vision_config": None if model_type == "gemma4" else VISION}
    text_config = {**COMMON, **text, **changes, "model_type": text_type}
    return CONFIG_MAPPING[model_type](text_config=text_config, **towers, **own)


def base_of(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """A tiny model with random weights, as it comes out of a folder.

    Args:
        name: Of `CONFIGS`.
        folder: To save it in. Of a model with towers the whole is saved, as on the Hub, and the language model loaded.
        changes: Of its configuration.
    """
    torch.manual_seed(0)
    config = config_of(name, **changes)
    kind = AutoModelForImageTextToText if config.model_type in COMPOSITE else AutoModelForCausalLM
    model = kind.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if "correct_output_scale" in parameter_name:  # Gemma 3n's, zero at the start, which would hide gradients
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded


def adapted(base: PreTrainedModel, targets: tuple[str, ...]) -> PeftModel:
    """With an adapter that changes something."""
    model = attach_adapter(base, LoraSection(r=3, dropout=0.0), targets, base_name="tiny", seed=0)
    torch.manual_seed(1)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:  # zero at the start, which would hide A's gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def examples() -> list[Example]:
    """Of different lengths, most of them longer than the windows of the tiny models."""
    rng = np.random.default_rng(0)
    made = []
    for length in (17, 5, 23, 9, 31):
        supervised = rng.random(length) < 0.6
        supervised[-1] = True
        ids = rng.integers(3, 97, length).astype(np.int32)
        made.append(Example(input_ids=ids, supervised=supervised, origin=Origin(file="made", line=length)))
    return made


def plain_loss_and_gradients(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """The model's own forward and the loss of its logits, one example at a time: the reference."""
    total = torch.zeros(())
    for example in examples():
        ids = torch.from_numpy(example.input_ids).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        labels = ids[0].where(torch.from_numpy(example.supervised), torch.tensor(-100))
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
    gradients = torch.autograd.grad(total, list(trainable_parameters(model).values()))
    return float(total.detach()), dict(zip(trainable_parameters(model), gradients, strict=True))


def check_loss(model: PeftModel) -> tuple[bool, str]:
    """Whether examples are packed and why not, after a comparison of the loss and of every gradient with the plain
    ones."""
    expected, expected_gradients = plain_loss_and_gradients(model)
    loss, reason = make_loss(model, examples())
    total = loss.sum(collate(examples()))
    gradients = torch.autograd.grad(total, list(trainable_parameters(model).values()))
    # float32, sums of some hundred nats
    assert abs(float(total.detach()) - expected) < 1e-5 * expected
    # float32 through some layers: relative to the largest gradient of each matrix
    for gradient, (name, wanted) in zip(gradients, expected_gradients.items(), strict=True):
        scale = float(wanted.abs().max())
        assert scale > 0, name
        assert float((gradient - wanted).abs().max()) < 1e-4 * scale, name
    return loss.packed, reason


def merged_difference(model: PeftModel, folder: Path) -> float:
    """The largest difference of the merged folder's logits from the adapted model's, as a share of the largest logit.

    Args:
        model: The adapted model; its base lies in `folder/base`.
        folder: To write in.
    """
    ids = torch.tensor([[5, 9, 33, 2, 71, 8, 40, 11, 95, 6, 23, 17]])
    save_adapter(model, folder / "adapter")
    (folder / "merged").mkdir()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            assert float((model(input_ids=ids).logits - expected).abs().max()) > 0.1, "an adapter that does nothing"
        write_merged(folder / "base", read_adapter(folder / "adapter"), folder / "merged", dtype=None)
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
        difference = float((merged(input_ids=ids).logits - expected).abs().max())
    return difference / max(1.0, float(expected.abs().max()))


def examine(name: str, folder: Path) -> dict[str, str]:
    """The family's row of the page.

    Args:
        name: Of `CONFIGS`.
        folder: To write in, empty.

    Raises:
        AssertionError: Something is silently wrong: a loss, a gradient, a merged weight.
    """
    base = base_of(name, folder / "base")
    presets = {preset: _resolved(base, preset) for preset in PRESET_ROLES}
    targets = presets["complete"] or resolve_targets(base, BY_HAND[name])
    left_out = _left_out(base, targets)
    model = adapted(base, targets)
    assert _adapted_modules(model) == set(targets), "PEFT adapts others than it was told"
    model.eval()
    merged = merged_difference(model, folder)
    assert merged < 1e-5  # float32
    model.train(name not in RANDOM)
    packed, reason = check_loss(model)
    counts = [str(len(found)) if found else "refused" for found in presets.values()]
    return {
        "family": name,
        "`model_type`": f"`{CONFIGS[name][0]}`",
        "minimal, balanced, attention, complete": ", ".join(counts) if any(presets.values()) else "refused",
        "left out by `complete`": left_out if presets["complete"] else "",
        "examples": "packed" if packed and not reason else f"one at a time: {reason}",
        "fast = plain": "yes",
        "merged = adapter": "yes",
        "GGUF": _taken(lambda: family_of(base.config)),
        "adapter in vLLM": _taken(lambda: check_vllm(read_adapter(folder / "adapter"), base.config)),
    }


def _taken(ask: Callable[[], object]) -> str:
    try:
        ask()
    except RecipeError:
        return "no"
    return "yes"


def _resolved(base: PreTrainedModel, preset: str) -> tuple[str, ...]:
    try:
        return resolve_targets(base, preset)
    except RecipeError:
        return ()


def _adapted_modules(model: PeftModel) -> set[str]:
    return {
        name.removesuffix(".lora_A") for name, _ in model.get_base_model().named_modules() if name.endswith(".lora_A")
    }


def _left_out(base: PreTrainedModel, targets: Sequence[str]) -> str:
    """The matrices in the layers that stay frozen, by their last names."""
    stack = re.match(r"(.*?)\.\d+\.", targets[0])
    assert stack is not None
    names = set()
    for name, parameter in base.named_parameters():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        is_matrix = parameter.ndim == 2 and not name.endswith("bias") and leaf != "A_log"
        is_stack = parameter.ndim == 3 and "experts" in name
        if name.startswith(f"{stack[1]}.") and (is_matrix or is_stack) and name.removesuffix(".weight") not in targets:
            names.add(f"{path.rpartition('.')[2]}.{leaf}" if is_stack else leaf)
    return ", ".join(f"`{name}`" for name in sorted(names))
