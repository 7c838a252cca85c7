"""GGUF files of every family, loaded by llama.cpp where it is installed, and read back otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.gguf.adapter import read_gguf_adapter, write_gguf_adapter
from loratune.exporting.gguf.architectures import GgufLayout
from loratune.exporting.gguf.model import GgufSource, write_gguf_model
from loratune.exporting.gguf.tokenizer import split_name
from loratune.exporting.load_back import LlamaCppReader, has_llama_cpp
from loratune.exporting.weights_proof import prove_adapter
from loratune.run.errors import RecipeError, RunError

needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, on made-up configs

COMMON: dict[str, Any] = {
    "vocab_size": 400,
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
GEMMA = {**COMMON, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "llama-bias-tied": LlamaConfig(**COMMON, attention_bias=True, tie_word_embeddings=True),
    "llama3": LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "smollm3": SmolLM3Config(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=32),
    "gemma": GemmaConfig(**COMMON, head_dim=32),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**GEMMA),
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IDS = [1, 17, 220, 45, 301, 77, 12, 399, 8, 150, 64, 33, 5, 271, 90, 18]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """256 bytes and a few merges."""
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2")]
    pieces = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def parts(
    base: Path,
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    updates: dict[str, LowRank] | None = None,
) -> GgufSource:
    return GgufSource(
        base=base,
        config=config,
        tokenizer=tokenizer,
        name="a",
        stop_token_ids=(5, 2),
        updates=updates or {},
    )


def random_model(config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if "gemma" in config.model_type else 1.0, std=0.3)
    return model


def random_updates(model: torch.nn.Module) -> dict[str, LowRank]:
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    return {
        name: LowRank(
            a=torch.randn(3, module.in_features) * 0.1, b=torch.randn(module.out_features, 3) * 0.1, scale=2.0
        )
        for name, module in modules.items()
    }


@torch.no_grad()
def adapted_logprobs(model: torch.nn.Module, updates: dict[str, LowRank]) -> torch.Tensor:
    for name, update in updates.items():
        module = model.get_submodule(name)
        module.weight.copy_(update.applied_to(module.weight))
    return model(torch.tensor([IDS])).logits[0].log_softmax(-1)


def mean_kl(expected: torch.Tensor, logits: torch.Tensor) -> float:
    return float((expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).mean())


@needs_llama_cpp
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_merged_model_and_the_adapter_on_its_base(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    model = random_model(config)
    model.save_pretrained(tmp_path)
    updates = random_updates(model)
    for file, chosen in (("base.gguf", {}), ("merged.gguf", updates)):
        write_gguf_model(parts(tmp_path, config, tokenizer, chosen), tmp_path / file, outtype="f32")
    write_gguf_adapter(updates, config, tmp_path / "lora.gguf", name=name)
    with torch.no_grad():
        without = model(torch.tensor([IDS])).logits[0]
    expected = adapted_logprobs(model, updates)
    assert mean_kl(expected, without) > 0.01
    for file, adapter in (("merged.gguf", None), ("base.gguf", tmp_path / "lora.gguf")):
        reader = LlamaCppReader(tmp_path / file, adapter=adapter, num_tokens=32)
        # keys and values are kept in float16 by llama.cpp
        assert mean_kl(expected, reader.logits(IDS, range(len(IDS)))) < 2e-5
        reader.close()


@needs_llama_cpp
def test_llama_cpp_tokenizes_renders_and_stops_as_training(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    write_gguf_model(parts(tmp_path, CONFIGS["llama"], tokenizer), tmp_path / "a.gguf", outtype="f32")
    reader = LlamaCppReader(tmp_path / "a.gguf", num_tokens=64)
    chat = [{"role": "user", "content": "the  12 thé 你 \n\n!"}]
    assert reader.prompt_ids(chat, None) == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert [token for token in range(400) if reader.ends_with(token)] == [2, 5]
    reader.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_read_back_is_the_one_that_was_written(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    updates = random_updates(random_model(config))
    odd = next(iter(updates))
    updates[odd] = LowRank(a=updates[odd].a, b=updates[odd].b, scale=0.5)  # a scale of its own
    write_gguf_adapter(updates, config, tmp_path / "lora.gguf", name=name)
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "lora.gguf").fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    for module, update in read_gguf_adapter(tmp_path / "lora.gguf", config, updates).items():
        wanted = updates[module]
        torch.testing.assert_close(update.scale * update.b @ update.a, wanted.scale * wanted.b @ wanted.a)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_an_adapter_of_another_type_is_compared_within_its_rounding_or_refused(kind: str, tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    updates = random_updates(random_model(config))
    write_gguf_adapter(updates, config, tmp_path / "lora.gguf", name="llama")
    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_float32("adapter.lora.alpha", 6.0)
    for tensor in GGUFReader(tmp_path / "lora.gguf").tensors:
        own = GGMLQuantizationType[kind if tensor.name.endswith("lora_a") else "F16"]
        writer.add_tensor(tensor.name, quantize(tensor.data, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if kind == "Q8_0":
        with pytest.raises(RunError, match="is Q8_0"):
            read_gguf_adapter(tmp_path / "other.gguf", config, updates)
        return
    proof = prove_adapter(updates, read_gguf_adapter(tmp_path / "other.gguf", config, updates))
    assert proof["problems"] == []
    assert proof["types"] == [kind]
    assert 1e-5 < proof["relative_error"] < 1e-2


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_every_outtype_is_read_back_within_its_rounding(
    outtype: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from gguf import dequantize

    model = random_model(CONFIGS["qwen2"])
    model.save_pretrained(tmp_path)
    write_gguf_model(parts(tmp_path, CONFIGS["qwen2"], tokenizer), tmp_path / "a.gguf", outtype=outtype)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert {tensor.tensor_type.name.lower() for tensor in tensors.values()} == {outtype, "f32"}
    layout = GgufLayout(CONFIGS["qwen2"])
    for name, parameter in model.state_dict().items():
        stored = tensors[layout.name(name)]
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        relative = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[outtype]
        assert float((values - parameter).abs().max()) <= relative * float(parameter.abs().max()), name


def test_an_unknown_architecture_and_unknown_positions_are_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="architecture gpt2"):
        GgufLayout(GPT2Config())
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(**COMMON, rope_parameters=rope)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="positions of type dynamic"):
        write_gguf_model(parts(tmp_path, config, tokenizer), tmp_path / "a.gguf", outtype="f16")


def test_beyond_its_window_a_model_is_not_claimed_to_work(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = MistralConfig(**COMMON, sliding_window=40)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_gguf_model(parts(tmp_path, config, tokenizer), tmp_path / "a.gguf", outtype="f16")
    field = GGUFReader(tmp_path / "a.gguf").get_field("llama.context_length")
    assert field is not None
    assert field.contents() == 40


def test_how_text_is_split_is_named_or_refused() -> None:
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    plain = {**gpt2, "use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": words}}

    def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}

    assert split_name({"pre_tokenizer": gpt2}) == "gpt-2"
    assert split_name(sequence(digits, gpt2)) == "smollm"
    assert split_name(sequence(split, plain)) == "llama-bpe"
    one_digit = {"type": "Split", "pattern": {"Regex": words.replace("{1,3}", "")}}
    assert split_name(sequence(one_digit, plain)) == "qwen2"
    for unknown in (sequence({"type": "Split", "pattern": {"Regex": r"\w+"}}, plain), {"pre_tokenizer": None}):
        with pytest.raises(RecipeError, match="pre-tokenizer is unknown"):
            split_name(unknown)


@needs_llama_cpp
def test_a_sentencepiece_tokenizer_gets_scores_that_merge_in_the_same_order(tmp_path: Path) -> None:
    """Bytes as fallback, spaces as ▁: the kind of Llama 2, Mistral and Gemma."""
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    letters = ["▁", "a", "b", "c", "d"]
    merges = [("b", "c"), ("a", "b"), ("▁", "a"), ("▁a", "bc"), ("c", "d"), ("ab", "cd"), ("▁", "▁")]
    pieces = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    random_model(CONFIGS["gemma"]).save_pretrained(tmp_path)
    write_gguf_model(parts(tmp_path, CONFIGS["gemma"], tokenizer), tmp_path / "a.gguf", outtype="f32")
    reader = LlamaCppReader(tmp_path / "a.gguf", num_tokens=64)
    for text in ("abcd", "abc ab  abcd cd", "é a\nb", "dcba abcabc"):
        chat = [{"role": "user", "content": text}]
        wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert reader.prompt_ids(chat, None) == wanted, text
    reader.close()
