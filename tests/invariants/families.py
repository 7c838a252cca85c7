"""A tiny random model of every family that people fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig

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
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, 3": ("llama", {}),
    "Llama 4 (text)": (
        "llama4_text",
        {**EXPERTS, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
         "attention_chunk_size": 8, "no_rope_layers": [1, 0], "floor_scale": 4},
    ),
    "Qwen2, 2.5": ("qwen2", {}),
    "Qwen2 MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Qwen3 MoE": ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "Qwen3-Next": ("qwen3_next", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "Qwen3.5 (text)": ("qwen3_5_text", DELTA),
    "Qwen3.5 MoE (text)": ("qwen3_5_moe_text", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "Mistral": ("mistral", WINDOW),
    "Ministral": ("ministral", {**WINDOW, **HALF_FULL, "head_dim": 8}),
    "Ministral 3": (
        "ministral3",
        {"head_dim": 8, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
         "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0,
         "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "Mixtral": ("mixtral", {**EXPERTS, **WINDOW}),
    "Gemma": ("gemma", {"head_dim": 8}),
    "Gemma 2": ("gemma2", {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "Gemma 3 (text)": ("gemma3_text", {**GEMMA, **HALF_FULL, "query_pre_attn_scalar": 8}),
    "Gemma 3n (text)": (
        "gemma3n_text",
        {**GEMMA, **HALF_FULL, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "intermediate_size": 48,
         "altup_num_inputs": 2, "laurel_rank": 4, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    ),
    "Gemma 4 (text)": (
        "gemma4_text",
        {**GEMMA, **HALF_FULL, "global_head_dim": 8, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
         "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "Gemma 4 MoE (text)": (
        "gemma4_text",
        {**GEMMA, **HALF_FULL, **EXPERTS, "global_head_dim": 8, "vocab_size_per_layer_input": 97,
         "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2, "attention_k_eq_v": True},
    ),
    "Phi 1, 2": ("phi", {"num_key_value_heads": 4}),
    "Phi 3, 4": ("phi3", {"sliding_window": None}),
    "Phi 3.5 MoE": ("phimoe", {**EXPERTS, "input_jitter_noise": 0.0, "router_jitter_noise": 0.0, "sliding_window": None}),
    "OLMo": ("olmo", {"clip_qkv": 1.0}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {**WINDOW, **HALF_FULL}),
    "OLMoE": ("olmoe", EXPERTS),
    "Granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "Granite MoE": ("granitemoe", {**EXPERTS, "logits_scaling": 4.0}),
    "Granite 4 (hybrid)": (
        "granitemoehybrid",
        {**EXPERTS, **MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "logits_scaling": 4.0},
    ),
    "SmolLM3": ("smollm3", {}),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}),
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
        {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
         "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "Bamba": ("bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    "Zamba 2": (
        "zamba2",
        {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 8, "chunk_size": 8,
         "use_mamba_kernels": False, "num_key_value_heads": 4, "num_mem_blocks": 1},
    ),
    "Nemotron-H": (
        "nemotron_h",
        {"layers_block_type": ["mamba", "attention", "mlp"], "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
         "n_groups": 1, "chunk_size": 8, "head_dim": 8, "use_mamba_kernels": False, "num_hidden_layers": 3},
    ),
    "LFM 2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Mamba": ("mamba", {"state_size": 4}),
    "Mamba 2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2}),
}


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    model_type, own = CONFIGS[name]
    return CONFIG_MAPPING[model_type](**{**COMMON, **own, **changes})
