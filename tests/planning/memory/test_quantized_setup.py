"""What a quantized base decides of the memory plan: the type it is held in, its bytes, and what is unpacked of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loratune.model.quantization import quantize
from loratune.model.quantization.quantize import base_bytes, unpacked_bytes
from loratune.planning.hardware.devices import DEVICES
from loratune.planning.memory import quantized
from loratune.planning.memory.quantized import check_device_can_quantize, quantized_setup
from loratune.run.errors import MachineError


def model(**stored: object) -> LlamaForCausalLM:
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, **settings, **stored))


def test_an_ordinary_base_decides_nothing_but_the_name() -> None:
    assert quantized_setup("none", Path(), model(), "float32") == {"quantization": "none"}


def test_a_base_to_be_packed_takes_its_packed_bytes() -> None:
    base = model()
    assert quantized_setup("nf4", Path(), base, "bfloat16") == {
        "quantization": "nf4",
        "weights_bytes": base_bytes(base, "nf4", 2),
        "unpacked_bytes": unpacked_bytes(base, "nf4", 2),
    }


@pytest.mark.parametrize(
    ("stored", "quantization", "unpacked_as"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "none", "none"),
        ({"quant_method": "torchao"}, "none", "float8_weight_only"),
    ],
)
def test_a_base_that_comes_packed_takes_the_bytes_of_its_files(
    stored: dict[str, object], quantization: str, unpacked_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model(quantization_config=stored)
    monkeypatch.setattr(quantized, "packed_bytes", lambda folder, _, dtype_bytes: len(str(folder)) * dtype_bytes)
    monkeypatch.setattr(quantized, "unpacked_bytes", lambda _, kind, dtype_bytes: (kind, dtype_bytes))
    made = quantized_setup("none", Path("files"), base, "bfloat16")
    assert made == {"quantization": quantization, "weights_bytes": 5 * 2, "unpacked_bytes": (unpacked_as, 2)}


def test_packages_are_needed_here_and_not_for_the_plan_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="bitsandbytes is not installed"):
        check_device_can_quantize("nf4", "cpu", None)
    check_device_can_quantize("nf4", "cuda", DEVICES["h100-80gb"])


def test_fp8_needs_a_device_that_multiplies_it() -> None:
    with pytest.raises(MachineError, match="fp8"):
        check_device_can_quantize("fp8", "cpu", None)
