"""Settings that change what is computed are compared by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from transformers import Gemma2Config, LlamaConfig

from loratune.exporting.gguf.architectures import GgufLayout
from loratune.exporting.gguf.model import add_hyperparameters
from loratune.exporting.structure import config_differences, gguf_differences
from loratune.model.gguf_config import ROPE_FACTORS

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


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
OTHER_BASE = {"rope_type": "default", "rope_theta": 5e5}
Change = Callable[[dict[str, Any], dict[str, np.ndarray[Any, Any]]], Any]


def write_gguf(file: Path, config: LlamaConfig, change: Change) -> Path:
    writer = GGUFWriter(str(file), "llama")
    tensors = {
        "token_embd.weight": np.zeros((4, 4), np.float32),
        **add_hyperparameters(writer, config, GgufLayout(config)),
    }
    change(writer.kv_data[0], tensors)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _set(key: str, value: Any, kind: GGUFValueType) -> Change:
    return lambda keys, _: keys.update({key: GGUFValue(value, kind)})


def _lose(key: str) -> Change:
    return lambda keys, _: keys.pop(key)


FLOAT, TEXT = GGUFValueType.FLOAT32, GGUFValueType.STRING


@pytest.mark.parametrize(
    ("rope", "change", "words"),
    [
        (OTHER_BASE, _set("llama.rope.freq_base", 1e4, FLOAT), "llama.rope.freq_base is 10000.0, and 500000.0"),
        (OTHER_BASE, _lose("llama.rope.freq_base"), "llama.rope.freq_base is 10000.0, and 500000.0"),
        (OTHER_BASE, _set("llama.rope.scaling.type", "linear", TEXT), "rope.scaling.type is 'linear', and 'none'"),
        (YARN, _set("llama.rope.scaling.factor", 2.0, FLOAT), "rope.scaling.factor is 2.0, and 4.0"),
        (YARN, _lose("llama.rope.scaling.type"), "rope.scaling.type is 'none', and 'yarn'"),
        (LLAMA3, lambda _, tensors: tensors.pop(ROPE_FACTORS), "the factors of rotary positions"),
        (LLAMA3, lambda _, tensors: tensors[ROPE_FACTORS].fill(1), "the factors of rotary positions"),
        (
            OTHER_BASE,
            lambda _, tensors: tensors.update({ROPE_FACTORS: np.ones(4, np.float32)}),
            "the factors of rotary",
        ),
    ],
)
def test_a_gguf_file_with_another_setting_or_without_it_is_named(
    tmp_path: Path, rope: dict[str, Any], change: Change, words: str
) -> None:
    config = LlamaConfig(**LLAMA, rope_parameters=rope)
    file = write_gguf(tmp_path / "wrong.gguf", config, change)
    (found,) = gguf_differences(file, config, GgufLayout(config), None)
    assert words in found
    source = write_gguf(tmp_path / "source.gguf", config, lambda *_: None)
    assert gguf_differences(file, config, GgufLayout(config), source) == [found]


@pytest.mark.parametrize("rope", [OTHER_BASE, YARN, LLAMA3])
@pytest.mark.parametrize("lost", [(), ("llama.attention.key_length", "llama.attention.value_length")])
def test_a_right_gguf_file_has_no_difference(tmp_path: Path, rope: dict[str, Any], lost: tuple[str, ...]) -> None:
    config = LlamaConfig(**LLAMA, rope_parameters=rope)
    file = write_gguf(tmp_path / "right.gguf", config, lambda keys, _: [keys.pop(key) for key in lost])
    assert gguf_differences(file, config, GgufLayout(config), None) == []


def test_a_file_of_another_architecture_is_named(tmp_path: Path) -> None:
    config = LlamaConfig(**LLAMA)
    file = write_gguf(tmp_path / "file.gguf", config, _set("general.architecture", "qwen2", TEXT))
    assert gguf_differences(file, config, GgufLayout(config), None) == [
        "general.architecture is 'qwen2', and 'llama' in the base"
    ]
