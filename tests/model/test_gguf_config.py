"""A GGUF file as base computes what llama.cpp computes with it, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from loratune.exporting.gguf.model import GgufSource, write_gguf_model
from loratune.exporting.load_back import TransformersReader
from loratune.model.gguf_config import _LARGEST_GEMMA, gemma_attention_scalar, gguf_config
from loratune.model.gguf_import import import_gguf
from loratune.run.errors import RunError
from loratune.run.progress import NoProgress

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GEMMA = {**SIZES, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}
POSITIONS = torch.arange(40).unsqueeze(0) % 23 + 1


def llama3(factor: float, low: float, high: float, original: int, theta: float = 500_000.0) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 4.0}
LOCAL_AND_FAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
}
CONFIGS: dict[str, Any] = {
    "llama": lambda **also: LlamaConfig(**SIZES, **also),
    "llama with biases": lambda **also: LlamaConfig(**SIZES, **also, attention_bias=True, mlp_bias=True),
    "llama of wide heads": lambda **also: LlamaConfig(**SIZES, **also, head_dim=24),
    "llama 3.1": lambda **also: LlamaConfig(**SIZES, **also, rope_parameters=llama3(8.0, 1.0, 4.0, 64)),
    "llama 3 of other numbers": lambda **also: LlamaConfig(
        **{**SIZES, "num_attention_heads": 2}, **also, rope_parameters=llama3(32.0, 2.0, 5.0, 128, theta=1e4)
    ),
    "llama of long context": lambda **also: LlamaConfig(**SIZES, **also, rope_parameters=YARN),
    "qwen2": lambda **also: Qwen2Config(**SIZES, **also, rope_parameters=LINEAR),
    "qwen3": lambda **also: Qwen3Config(**SIZES, **also, head_dim=32),
    "qwen3 with biases": lambda **also: Qwen3Config(**SIZES, **also, head_dim=16, attention_bias=True),
    "gemma2": lambda **also: Gemma2Config(**GEMMA, **also, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda **also: Gemma3TextConfig(**GEMMA, **also, rope_parameters=LOCAL_AND_FAR),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A token for each byte and one merge, without which transformers reads no tokenizer from GGUF."""
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*pieces, "he"])}, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.nn.Module, Path]:
    """Write a random model as GGUF; return it and the file."""
    config = CONFIGS[name](vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, mean=0.0 if "gemma" in config.model_type else 1.0, std=0.3)
    model.save_pretrained(folder / "model")
    source = GgufSource(
        base=folder / "model", config=config, tokenizer=tokenizer, name="a", stop_token_ids=(2,), updates={}
    )
    write_gguf_model(source, folder / "a.gguf", outtype="f32")
    return model, folder / "a.gguf"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_from_gguf_computes_what_the_model_computes(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    model, file = write(name, tmp_path, tokenizer)
    imported = AutoModelForCausalLM.from_pretrained(import_gguf(file, Told())).eval()
    reader = TransformersReader(tmp_path, dtype=torch.float32, gguf_file=file.name)
    with torch.no_grad():
        expected = model(POSITIONS).logits[0]
        assert torch.allclose(imported(POSITIONS).logits[0], expected, rtol=0, atol=2e-4)
    ids = POSITIONS[0].tolist()
    assert torch.allclose(reader.logits(ids, range(len(ids))), expected, rtol=0, atol=2e-4)


def test_the_scale_of_the_largest_gemma_is_not_its_heads(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gemma_attention_scalar("gemma2", 46, 4608, 32, 128) == 144  # as Gemma 2 27B's configuration says
    assert gemma_attention_scalar("gemma3", 62, 5376, 32, 128) == 168  # Gemma 3 27B's
    assert gemma_attention_scalar("gemma3", 26, 1152, 4, 256) == 256  # Gemma 3 1B's
    monkeypatch.setitem(_LARGEST_GEMMA, "gemma2", SIZES["num_hidden_layers"])
    monkeypatch.setitem(GEMMA, "query_pre_attn_scalar", 16)
    _, file = write("gemma2", tmp_path, tokenizer)
    assert gguf_config(file).query_pre_attn_scalar == 16


class Told(NoProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


Change = Callable[[dict[str, Any], dict[str, np.ndarray[Any, Any]]], Any]


def changed(file: Path, change: Change, architecture: str | None = None) -> Path:
    """Copy a GGUF file with other settings or tensors."""
    reader = gguf.GGUFReader(file)
    settings = {entry.name: entry for entry in reader.fields.values() if not entry.name.startswith("GGUF.")}
    old = str(settings["general.architecture"].contents())
    writer = gguf.GGUFWriter(file.with_name("changed.gguf"), architecture or old)
    values = {name: entry.contents() for name, entry in settings.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(values, tensors)
    for name, value in values.items():
        if name == "general.architecture":
            continue
        entry = settings.get(name)
        kind = gguf.GGUFValueType.get_type(value) if entry is None else entry.types[0]
        sub_type = entry.types[-1] if entry is not None and kind is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace(f"{old}.", f"{architecture or old}."), value, kind, sub_type=sub_type)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.with_name("changed.gguf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values, _: values.update({"llama.expert_count": 8}), "llama with 8 experts"),
        (lambda values, _: values.update({"llama.attention.value_length": 8}), "keys of 16 values and values of 8"),
        (lambda values, _: values.update({"llama.rope.dimension_count": 8}), "positions for 8 of a head's 16"),
        (lambda values, _: values.update({"llama.rope.scaling.type": "longrope"}), "positions of type longrope"),
        (lambda _, tensors: tensors.update({"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}), "not Llama"),
    ],
)
def test_a_setting_that_transformers_cannot_compute_is_refused(
    change: Change, words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    _, file = write("llama", tmp_path, tokenizer)
    with pytest.raises(RunError, match="transformers would compute another model") as error:
        gguf_config(changed(file, change))
    assert words in str(error.value)
    assert "safetensors" in error.value.fix


def test_factors_of_one_and_the_caps_that_llama_cpp_assumes(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    _, file = write("llama", tmp_path, tokenizer)
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert gguf_config(changed(file, lambda _, tensors: tensors.update(ones))).rope_parameters["rope_type"] == "default"
    _, file = write("gemma2", tmp_path, tokenizer)
    caps = ("gemma2.attn_logit_softcapping", "gemma2.final_logit_softcapping")
    config = gguf_config(changed(file, lambda values, _: [values.pop(name) for name in caps]))
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)


def test_settings_that_nobody_reads_are_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    _, file = write("llama", tmp_path, tokenizer)
    told = Told()
    gguf_config(file, told)
    assert told.warnings == []
    gguf_config(changed(file, lambda values, _: values.update({"llama.new_setting": 3})), told)
    assert told.warnings == ["changed.gguf: settings that are not read: new_setting=3"]


def test_an_architecture_that_was_not_compared_is_told_and_its_stretched_positions_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    _, file = write("llama", tmp_path, tokenizer)
    told = Told()
    gguf_config(changed(file, lambda *_: None, architecture="phi3"), told)
    assert "how transformers reads the architecture phi3 was not compared" in told.warnings[0]
    factors = {"rope_factors_long.weight": np.full(8, 2, np.float32)}
    with pytest.raises(RunError, match="the stretched positions of phi3 are not read"):
        gguf_config(changed(file, lambda _, tensors: tensors.update(factors), architecture="phi3"))
