"""llama.cpp's own quantizer: the types it writes, what a file of them proves, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import LlamaConfig, PreTrainedTokenizerBase

from loratune.exporting.gguf import quantizer
from loratune.exporting.gguf.architectures import GgufLayout
from loratune.exporting.gguf.model import write_gguf_model
from loratune.exporting.gguf.quantizer import QUANTIZER_TYPES, TYPES_BY_SIZE, check_types, quantize_file
from loratune.exporting.load_back import LlamaCppReader
from loratune.exporting.merge_weights import MergedWeights
from loratune.exporting.proof_totals import MOST_DEVIATION
from loratune.exporting.weights_proof import prove_weights
from loratune.exporting.written_tensors import GgufTensors
from loratune.run.errors import MachineError, RecipeError, RunError
from tests.exporting.test_gguf import (
    COMMON,
    IDS,
    adapted_logprobs,
    mean_kl,
    needs_llama_cpp,
    parts,
    random_model,
    random_updates,
    tokenizer,
)

__all__ = ["tokenizer"]  # a fixture
WIDE = LlamaConfig(**{**COMMON, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2})


def test_types_that_do_not_exist_or_cannot_be_written_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(QUANTIZER_TYPES) < set(TYPES_BY_SIZE)
    with pytest.raises(RecipeError, match="--outtype q4_k is not a type"):
        check_types(["q8_0", "q4_k"])
    monkeypatch.setattr(quantizer, "find_spec", lambda _: None)
    check_types(["q8_0", "f16"])
    with pytest.raises(MachineError, match=r"llama\.cpp's quantizer writes q4_k_m") as error:
        check_types(["q4_k_m"])
    assert "llama-cpp-python" in error.value.fix


@needs_llama_cpp
def test_a_file_that_cannot_be_quantized_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(RunError, match="could not quantize the model to q4_k_m"):
        quantize_file(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m")


@needs_llama_cpp
def test_quantized_files_shrink_in_order_and_prove_the_update_or_its_loss(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = random_model(WIDE)
    model.save_pretrained(tmp_path)
    updates = random_updates(model)
    written = {"merged": updates, "base": {}}
    for name, chosen in written.items():
        write_gguf_model(parts(tmp_path, WIDE, tokenizer, chosen), tmp_path / f"{name}.gguf", outtype="f32")
    sizes = []
    for outtype in QUANTIZER_TYPES:
        quantize_file(tmp_path / "merged.gguf", tmp_path / f"{outtype}.gguf", outtype)
        sizes.append((tmp_path / f"{outtype}.gguf").stat().st_size)
        record = proof(tmp_path, tmp_path / f"{outtype}.gguf", updates)
        assert record["problems"] == [], outtype
        assert record["kept"] == pytest.approx(1, abs=MOST_DEVIATION), outtype
    assert sizes == sorted(sizes)
    quantize_file(tmp_path / "base.gguf", tmp_path / "lost.gguf", "q4_k_m")
    assert "lack their update" in proof(tmp_path, tmp_path / "lost.gguf", updates)["problems"][0]


@needs_llama_cpp
def test_llama_cpp_computes_what_the_values_in_the_file_say(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = random_model(WIDE)
    model.save_pretrained(tmp_path)
    write_gguf_model(parts(tmp_path, WIDE, tokenizer), tmp_path / "f32.gguf", outtype="f32")
    quantize_file(tmp_path / "f32.gguf", tmp_path / "q4.gguf", "q4_k_m")
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "q4.gguf").tensors}
    assert kinds == {"F32", "Q4_K", "Q6_K"}
    trained = adapted_logprobs(model, {})
    tensors = GgufTensors(tmp_path / "q4.gguf", GgufLayout(WIDE), tied=False)
    assert tensors.rounding is None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.as_stored(name, parameter))
        stored = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    reader = LlamaCppReader(tmp_path / "q4.gguf", num_tokens=32)
    found = reader.logits(IDS, range(len(IDS)))
    reader.close()
    # llama.cpp also rounds the inputs of each product, to 8 bits
    assert mean_kl(stored, found) < mean_kl(trained, found) / 4


def proof(base: Path, file: Path, updates: dict[str, Any]) -> Any:
    with MergedWeights(base, updates) as weights:
        return prove_weights(weights, GgufTensors(file, GgufLayout(WIDE), tied=False), base_name="base")
