"""What quantized values prove: the update they hold, and how far a right quantizer may be off."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.certificate import MOST_UNPROVEN
from loratune.exporting.merge_weights import MergedWeights
from loratune.exporting.quantized_proof import held_share, is_on_grid, largest_noise
from loratune.exporting.weights_proof import Rounding, prove_weights

LAYERS = tuple(f"model.layers.{layer}.mlp.up_proj" for layer in range(3))
SHAPE = (256, 512)


def quantized(values: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Values rounded to even steps in blocks of 32, as llama.cpp's types do in one way or another."""
    blocks = values.reshape(-1, 32)
    steps = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return ((blocks / steps).round() * steps).reshape(values.shape)


class FourBits:
    """Files of a type whose rounding nobody but its quantizer knows."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def find(self, name: str) -> str | None:
        return name if name in self.tensors else None

    def names(self) -> Iterable[str]:
        return self.tensors

    def read(self, name: str) -> tuple[torch.Tensor, Rounding | None, str]:
        return self.tensors[name], None, "Q4_K"

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    weights = {f"{layer}.weight": torch.randn(SHAPE) * 0.02 for layer in LAYERS}
    save_file({**weights, "model.embed_tokens.weight": torch.randn(64, 512) * 0.02}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def updates(size: float) -> dict[str, LowRank]:
    """An update a layer, of this size relative to the weights."""
    torch.manual_seed(1)
    scale = 0.02 * size / 4**0.5
    return {
        layer: LowRank(a=torch.randn(4, SHAPE[1]), b=torch.randn(SHAPE[0], 4) * scale, scale=1.0) for layer in LAYERS
    }


def proof(base: Path, wanted: dict[str, LowRank], file: dict[str, LowRank], change: Callable[..., Any] = dict) -> Any:
    """The proof of a file with the updates `file` against the run's."""
    with MergedWeights(base, file) as weights:
        tensors = {name: quantized(weights.tensor(name)) for name in weights.names}
    with MergedWeights(base, wanted) as intended:
        return prove_weights(intended, FourBits(change(tensors)), base_name="base")


def test_a_right_file_holds_the_whole_update_though_its_noise_is_far_larger(base: Path) -> None:
    record = proof(base, updates(0.02), updates(0.02))
    assert record["problems"] == []
    assert record["relative_error"] > 3
    assert record["unproven"] == 0
    assert record["kept"] == pytest.approx(1, abs=0.1)
    assert record["types"] == ["Q4_K"]


def test_what_is_not_the_trained_model_is_found_under_the_noise(base: Path) -> None:
    wanted = updates(0.02)
    nothing = proof(base, wanted, {})
    assert [text[:36] for text in nothing["problems"]] == ["3 of 3 matrices lack their update (t"]
    assert nothing["kept"] == pytest.approx(0, abs=0.1)
    one_lost = {name: update for name, update in wanted.items() if name != LAYERS[1]}
    assert proof(base, wanted, one_lost)["problems"][0].startswith("1 of 3 matrices lack their update (the first: mod")
    half = {name: LowRank(a=update.a, b=update.b / 2, scale=1.0) for name, update in wanted.items()}
    assert "3 of 3 matrices have a different update" in proof(base, wanted, half)["problems"][0]
    swapped = {**wanted, LAYERS[0]: wanted[LAYERS[1]], LAYERS[1]: wanted[LAYERS[0]]}
    assert "2 of 3 matrices lack" in proof(base, wanted, swapped)["problems"][0]

    def other_embedding(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        return {**tensors, "model.embed_tokens.weight": quantized(torch.randn(64, 512) * 0.02)}

    assert "1 of 1 tensors that the adapter does not" in proof(base, wanted, wanted, other_embedding)["problems"][0]


def test_on_a_base_that_was_quantized_before_a_lost_update_decides_nothing(tmp_path: Path) -> None:
    """The quantizer finds the same steps, and rounds every update below half a step back to the base."""
    torch.manual_seed(0)
    weights = {f"{layer}.weight": quantized(torch.randn(SHAPE) * 0.02) for layer in LAYERS}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert all(is_on_grid(values) for values in weights.values())
    assert not any(is_on_grid((torch.randn(SHAPE) * 0.02).to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    for file in (updates(0.005), {}):
        record = proof(tmp_path, updates(0.005), file)
        assert record["problems"] == []
        assert record["unproven"] == 1


def test_an_update_too_small_to_be_seen_is_neither_claimed_nor_called_lost(base: Path) -> None:
    for file in (updates(1e-4), {}):
        record = proof(base, updates(1e-4), file)
        assert record["problems"] == []
        assert record["unproven"] == 1 > MOST_UNPROVEN


def test_the_error_of_the_share_is_what_chance_makes_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    base, update = torch.randn(128, 256, generator=generator), 0.02 * torch.randn(128, 256, generator=generator)
    found = [
        held_share(base + update + 0.1 * torch.randn(128, 256, generator=generator), base, update) for _ in range(200)
    ]
    spread = torch.tensor([held.share for held in found]).std()
    assert found[0].error == pytest.approx(float(spread), rel=0.2)


def test_the_largest_noise_follows_the_bits_in_the_types_name() -> None:
    torch.manual_seed(0)
    exact = torch.randn(16, 256)
    for bits in (2, 3, 4, 5, 6):
        most = largest_noise(f"Q{bits}_K", exact)
        assert most is not None
        assert 0.4 * most < float((quantized(exact, bits) - exact).norm()) < 0.7 * most
    assert largest_noise("IQ4_XS", exact) == largest_noise("Q4_K", exact)
    assert largest_noise("TQ1_0", exact) is None
    assert largest_noise("Q4_K", torch.randn(4, 40)) is None
