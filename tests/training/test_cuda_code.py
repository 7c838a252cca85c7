"""The CUDA code of a training step, read without a GPU: what is fused, what is copied, how often it is written.

The shapes are those of Qwen2 1.5B; nothing has values, so nothing is computed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen2Config

from loratune.data.batch import MicroBatch, collate
from loratune.data.examples import Example
from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.adapter.narrow import cast_once
from loratune.model.adapter.targets import resolve_targets
from loratune.model.kernels import attention, cross_entropy
from loratune.model.kernels.dropout import row_numbers
from loratune.recipe.recipe import LoraSection
from loratune.training.layers import prepare_layers
from loratune.training.loss import SupervisedLoss
from tests.training.cuda_code import Written, without_values, writing_backend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.version.cuda is None,
    reason="this build of torch writes no CUDA code: run `make test-gpu-versions`",
)

HIDDEN, INNER, VOCABULARY, RANK = 1536, 8960, 151_936, 16
QWEN2 = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,  # the first runs uncompiled, the others share one graph
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LENGTHS = ((900, 1148), (3, 700, 37), (2048,), (5, 5, 5, 1300), (64, 1))
TOKENS = sum(LENGTHS[0])


def micro_batch(lengths: Sequence[int], mode: FakeTensorMode) -> MicroBatch:
    ids = [np.arange(length) % 50 for length in lengths]
    batch = collate([Example(input_ids=x, supervised=x >= 0, origin=None) for x in ids])  # type: ignore[arg-type]
    batch = replace(batch, rows=row_numbers(1, 0, range(len(lengths)), lengths))
    here: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch,
        **{
            name: mode.from_tensor(value)
            for name, value in here.items()
            if isinstance(value, torch.Tensor) and name != "host_boundaries"
        },
    )


@pytest.fixture(scope="module")
def written() -> list[Written]:
    """The code of the layers, forward and backward, and of the loss, after steps of various lengths."""
    codes: list[Written] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=writing_backend(codes)))
        patch.setattr(cross_entropy, "_compiled_chunk", cache(cross_entropy._compiled_chunk.__wrapped__))
        patch.setitem(cross_entropy.CHUNK_BYTES, "cpu", cross_entropy.CHUNK_BYTES["cuda"])
        patch.setattr(cross_entropy, "SIZES_IN_CODE", {"cpu"})
        patch.setattr(attention, "_is_on_gpu", lambda _: True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN2), dtype=torch.bfloat16)
        targets = resolve_targets(base, "balanced")
        lora = LoraSection(r=RANK, dropout=0.05)
        model = attach_adapter(base, lora, targets, base_name="imagined", seed=0)
        use_fast_layers(model)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        without_values(model, mode)
        loss = SupervisedLoss(model)
        prepare_layers(model, compiled=True, num_recomputed=0)
        loss.compiled = True
        model.train()
        for lengths in LENGTHS:
            batch = micro_batch(lengths, mode)
            with mode, cast_once(model):
                loss.sum(batch).backward()
    return codes


def triton(code: Written) -> list[str]:
    return [name for name in code.launches if name.startswith("triton_")]


def holding(code: Written, *parts: str) -> list[str]:
    return [name for name in triton(code) if all(part in name for part in parts)]


def test_one_graph_of_a_layer_and_one_of_the_loss_whatever_the_lengths(written: list[Written]) -> None:
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert len(written) == 3, "the layer forward and backward, and the loss with its gradient"


def test_norm_and_dropout_rotary_activation_and_residual_are_fused(written: list[Written]) -> None:
    forward, backward, _ = written
    assert holding(forward, "rsqrt", "bitwise_xor"), "the first norm with the masks of both adapted matrices"
    assert holding(forward, "neg", "cat"), "rotary positions"
    assert holding(forward, "silu", "mul"), "the product of the gate"
    assert holding(forward, "add", "rsqrt"), "the residual with the second norm"
    assert holding(backward, "silu_backward", "mul")
    assert holding(backward, "bitwise_xor", "sum"), "the gradient of the first norm with the masks"
    # Seven products of the layer, two of each adapter, attention, and element-wise kernels between them.
    products = sum(count for name, count in forward.launches.items() if name.startswith("extern_kernels"))
    assert products == 7 + 2 * 2
    assert sum(count for name, count in forward.launches.items() if "varlen" in name) == 1
    assert forward.launches.total() <= 11 + 1 + 9
    # No gradient of frozen weights: one product for each, and four for each adapter.
    products = sum(count for name, count in backward.launches.items() if name.startswith("extern_kernels"))
    assert products == 7 + 2 * 4


def test_no_weight_is_copied_or_cast(written: list[Written]) -> None:
    for code in written:
        for shape, _ in code.allocated:
            assert "s" in shape or shape in {f"{RANK}, {HIDDEN}", f"{HIDDEN}, {RANK}", f"256, {RANK}"}, shape
    assert not [shape for shape, _ in written[0].allocated if "s" not in shape], "the masters are cast before the step"


def test_no_activation_is_widened_in_memory(written: list[Written]) -> None:
    """Float32 is for numbers of a token: statistics of norms and of the softmax."""
    for code in written:
        for shape, dtype in code.allocated:
            tokens = [size for size in shape.split(", ") if "s" in size]
            if dtype == "float32" and tokens:
                assert all(size == "1" for size in shape.split(", ") if size != tokens[0]), shape


def test_the_softmax_reads_the_logits_twice_and_writes_their_gradient(written: list[Written]) -> None:
    loss = written[2]
    assert "triton_helpers.online_softmax_reduce" in loss.code, "maximum and sum in one pass"
    assert loss.code.count("for r0_offset in") == 2, "that pass, and the one that writes the gradient"
    assert len(triton(loss)) == 2, "the other kernel is for the targets' own entries"
    assert loss.launches["extern_kernels.mm"] == 2


def test_traffic_of_a_token_is_what_the_page_says(written: list[Written]) -> None:
    forward, backward, _ = written
    assert forward.fused_bytes / TOKENS < 105_000
    assert backward.fused_bytes / TOKENS < 155_000
