"""The way to torch's CUDA attention, run on a CPU with a substitute for that one function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as of_torch

from loratune.model.kernels import varlen_attention
from loratune.model.kernels.attention import observe_attention, packed_attention
from loratune.model.kernels.varlen_attention import machine_obstacle, takes_shared_heads, varlen_obstacle
from tests.model.kernels.test_attention import BOUNDARIES, LENGTHS, reference
from tests.model.kernels.varlen import SIGNATURES, pretend_gpu, varlen_2_11


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 4, 100])
def test_value_and_gradients_equal_the_definition(
    signature: str, num_key_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, SIGNATURES[signature])
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, num_key_heads, sum(LENGTHS), 8, dtype=torch.float64).requires_grad_() for _ in "kv")
    whole = {"cu_seq_lens_q": BOUNDARIES, "max_length_q": max(LENGTHS), "sliding_window": window}
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, scaling=0.3, **whole)
    expected = reference(query, key, value, window, None, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    for actual, wanted in zip(
        torch.autograd.grad(out, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def test_torch_s_own_signature_is_read() -> None:
    assert [takes_shared_heads(varlen) for varlen in SIGNATURES.values()] == [False, True]
    assert takes_shared_heads(of_torch.varlen_attn) == varlen_attention._TAKES_SHARED_HEADS
    assert varlen_attention.varlen_attn is of_torch.varlen_attn


def test_what_flash_attention_lacks_is_named() -> None:
    plain: dict[str, Any] = {"softcap": None, "has_sinks": False}
    bfloat16 = torch.bfloat16
    assert varlen_obstacle(bfloat16, 128, 128, **plain) == ""
    assert varlen_obstacle(torch.float16, 256, 256, **plain) == ""
    assert "has no float32" in varlen_obstacle(torch.float32, 128, 128, **plain)
    assert "soft cap" in varlen_obstacle(bfloat16, 128, 128, softcap=50.0, has_sinks=False)
    assert "sinks" in varlen_obstacle(bfloat16, 128, 128, softcap=None, has_sinks=True)
    assert "queries are 192 wide and values 128" in varlen_obstacle(bfloat16, 192, 128, **plain)
    assert "heads are 12 wide" in varlen_obstacle(bfloat16, 12, 12, **plain)
    assert "heads are 512 wide" in varlen_obstacle(bfloat16, 512, 512, **plain)


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert machine_obstacle() == "Tesla T4 (SM 7.5) is older than SM 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert machine_obstacle() == ""


def test_what_goes_through_blocks_on_a_gpu_is_right_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, varlen_2_11, any_type=False)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, sum(LENGTHS), 8) for _ in "qkv")
    whole = {"cu_seq_lens_q": BOUNDARIES, "max_length_q": max(LENGTHS), "scaling": 0.3}
    with observe_attention() as observed:
        out, _ = packed_attention(torch.nn.Module(), query, key, value, None, **whole)
        torch.testing.assert_close(out, reference(query, key, value, None, None, 0.3), rtol=1e-5, atol=1e-5)
        half = [x.bfloat16() for x in (query, key, value)]
        packed_attention(torch.nn.Module(), *half, None, **whole)
        assert observed.slow_because == {"flash attention has no float32"}
        packed_attention(torch.nn.Module(), *half, None, softcap=2.0, **whole)
    assert observed.slow_because == {"flash attention has no float32", "the scores have a soft cap"}


@pytest.mark.parametrize("num_key_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 4])
def test_the_installed_torch_accepts_what_it_is_given(num_key_heads: int, window: int | None) -> None:
    """Its own function, on tensors without values: shapes and arguments of forward and backward are checked."""
    query = torch.empty(1, 4, 18, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key, value = (torch.empty(1, num_key_heads, 18, 8, dtype=torch.bfloat16, device="meta") for _ in "kv")
    heads = (query, key.requires_grad_(), value.requires_grad_())
    out = varlen_attention.varlen_attention(*heads, BOUNDARIES.to("meta"), 9, scale=0.3, window=window)
    assert out.shape == (1, 18, 4, 8)
    gradients = torch.autograd.grad(out, heads, torch.empty_like(out))
    assert [gradient.shape for gradient in gradients] == [head.shape for head in heads]
