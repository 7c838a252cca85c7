"""Bytes of an encoder's layer, worked out by hand: saved, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loratune.model.adapter.targets import Matrix
from loratune.planning.memory.adapter import saved_bytes
from loratune.planning.memory.encoder import _NORM_STATISTICS_BYTES, encoder_layer_bytes
from loratune.planning.memory.inputs import LayerBytes
from loratune.recipe.recipe import LoraSection

LORA = LoraSection(r=4, dropout=0)
HIDDEN, WIDE, HEADS, LAYERS, LONGEST = 64, 256, 4, 2, 10
QUERY = [Matrix(name=f"layer.{n}.attention.self.query", d_in=HIDDEN, d_out=HIDDEN) for n in range(LAYERS)]


def bert(**changes: Any) -> SimpleNamespace:
    settings = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    return SimpleNamespace(**settings | {"intermediate_size": WIDE, "hidden_dropout_prob": 0.1} | changes)


def layer(config: Any, *, device: str = "cpu", fully_trained_saved: int = 0, dtype_bytes: int = 4) -> LayerBytes:
    return encoder_layer_bytes(
        config,
        dtype_bytes,
        QUERY,
        lora=LORA,
        longest=LONGEST,
        device=device,
        fully_trained_saved=fully_trained_saved,
    )


def test_a_forward_pass_holds_the_feed_forward_and_two_hidden_states() -> None:
    assert layer(bert()).forward == 4 * (2 * WIDE + 2 * HIDDEN)
    assert layer(bert(hidden_activation="gelu")).forward == 4 * (3 * WIDE + 2 * HIDDEN), "gated"
    assert layer(bert()).input == 4 * HIDDEN


def test_a_backward_pass_holds_the_larger_of_feed_forward_and_probabilities() -> None:
    narrow = {"intermediate_size": 8, "attention_probs_dropout_prob": 0.1}
    assert layer(bert()).backward == 4 * (2 * WIDE) + 4 * HIDDEN
    assert layer(bert(**narrow)).backward == 4 * 3 * HEADS * LONGEST + 4 * HIDDEN, "probabilities that dropout saves"
    assert layer(bert(**narrow), device="cuda").backward == 4 * (2 * 8) + 4 * HIDDEN, "a GPU keeps none"


def test_an_encoder_writes_no_cache_and_has_no_attention_in_blocks() -> None:
    assert (layer(bert()).cache, layer(bert()).attention) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        # Norms, feed-forward, two masks of dropout; query, key and value in float32, probabilities, masks.
        (
            {"attention_probs_dropout_prob": 0.1},
            "cpu",
            4 * (2 * HIDDEN + WIDE) + 2 * HIDDEN * 4 + 4 * (3 * HIDDEN + 3 * HEADS * LONGEST),
        ),
        # The masks of dropout in bytes, no probabilities: query, key, value, output, and the example's mask.
        (
            {"attention_probs_dropout_prob": 0.1},
            "cuda",
            4 * (2 * HIDDEN + WIDE) + 2 * HIDDEN + 4 * (4 * HIDDEN + LONGEST) + 4 * HEADS,
        ),
        ({"hidden_dropout_prob": None}, "cpu", 4 * (2 * HIDDEN + WIDE) + 4 * (4 * HIDDEN + LONGEST) + 4 * HEADS),
        (
            {"hidden_dropout_prob": None, "dropout": 0.1},
            "cpu",
            4 * (2 * HIDDEN + WIDE) + HIDDEN * 4 + 4 * (4 * HIDDEN + LONGEST) + 4 * HEADS,
        ),
        # Gated: the activation's input and output and the gate; the product that query, key and value are slices of.
        (
            {"hidden_dropout_prob": None, "hidden_activation": "gelu"},
            "cpu",
            4 * (2 * HIDDEN + 3 * WIDE) + 4 * (6 * HIDDEN + LONGEST) + 4 * HEADS,
        ),
        # Without a width in the configuration, four times the hidden size.
        (
            {"hidden_dropout_prob": None, "intermediate_size": None},
            "cpu",
            4 * (2 * HIDDEN + 4 * HIDDEN) + 4 * (4 * HIDDEN + LONGEST) + 4 * HEADS,
        ),
    ],
)
def test_what_a_layer_saves(changes: dict[str, Any], device: str, expected: int) -> None:
    adapters = saved_bytes(QUERY, LORA, 4) // LAYERS
    made = layer(bert(**changes), device=device)
    assert made.saved_for_backward == expected + _NORM_STATISTICS_BYTES + adapters


def test_modules_trained_in_full_add_what_they_save_shared_by_the_layers() -> None:
    more = layer(bert(), fully_trained_saved=1000).saved_for_backward - layer(bert()).saved_for_backward
    assert more == 1000 // LAYERS


def test_an_adapted_output_projection_has_counted_its_input() -> None:
    output = [Matrix(name="layer.0.attention.output.dense", d_in=HIDDEN, d_out=HIDDEN)]
    config = bert(hidden_dropout_prob=None)
    with_output, without = (
        encoder_layer_bytes(config, 4, matrices, lora=LORA, longest=LONGEST).saved_for_backward
        - saved_bytes(matrices, LORA, 4) // LAYERS
        for matrices in (output, QUERY)
    )
    assert without - with_output == 4 * HIDDEN
