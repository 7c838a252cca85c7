"""Settings that change what is computed are compared by themselves."""

from __future__ import annotations

import pytest
from transformers import Gemma2Config, LlamaConfig

from loratune.exporting.structure import config_differences

LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, "rope_parameters.rope_theta is 5000.0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, and 1e-06 in the base"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"head_dim": 16}, "head_dim is 16, and 8"),
    ],
)
def test_a_setting_of_another_model_is_named(change: dict[str, object], words: str) -> None:
    (found,) = config_differences(LlamaConfig(**LLAMA), LlamaConfig(**LLAMA, **change))
    assert words in found


def test_attention_scale_is_a_setting() -> None:
    (found,) = config_differences(Gemma2Config(), Gemma2Config(query_pre_attn_scalar=16))
    assert "query_pre_attn_scalar is 16, and 256 in the base" in found


def test_what_does_not_change_the_outputs_may_differ() -> None:
    free = {"dtype": "bfloat16", "use_cache": False, "eos_token_id": [1, 2], "vocab_size": 33000}
    assert config_differences(LlamaConfig(**LLAMA), LlamaConfig(**LLAMA, **free)) == []
