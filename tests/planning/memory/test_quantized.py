from __future__ import annotations

import pytest

from loratune.planning.hardware.devices import DEVICES
from loratune.planning.memory.quantized import check_device_can_quantize, quantization_notes
from loratune.run.errors import MachineError


def test_a_named_device_without_fp8_is_refused_for_fp8_only() -> None:
    check_device_can_quantize("fp8", "cuda", DEVICES["h100-80gb"])
    check_device_can_quantize("nf4", "cuda", DEVICES["a100-80gb"])
    with pytest.raises(MachineError, match=r"model\.quantization is fp8, .* this is a100-80gb"):
        check_device_can_quantize("fp8", "cuda", DEVICES["a100-80gb"])


def test_only_packed_weights_have_a_note_about_their_unpacking() -> None:
    assert quantization_notes("none", "bfloat16") == ()
    (note,) = quantization_notes("nf4", "bfloat16")
    assert "unpacking the nf4 weights" in note
