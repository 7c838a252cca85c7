"""What the proofs call the same is the same, however small the update, and what is not is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.exporting.adapter_matrices import LowRank, Replaced
from loratune.exporting.adapters import check
from loratune.exporting.adapters.check import check_updates
from loratune.exporting.adapters.folder import Adapter, read_folder
from loratune.exporting.weights_proof import prove_adapter, same_values
from loratune.run.errors import RunError
from loratune.workflows.adapters import compare, make
from loratune.workflows.adapters.compare import certify_adapter, merge_adapter
from loratune.workflows.adapters.make import combine_adapters, convert_adapter
from tests.workflows.adapters.conftest import MakeAdapter

TINY = 1e-4
"""Standard deviation of factors whose update is 1e-8, which no logit shows in float32."""


def edit(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change tensors in a folder's only file of weights."""
    (file,) = folder.glob("*.safetensors")
    changed = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(changed, file, {"format": "pt"})


def without_updates(write: Callable[[Path, Adapter], None]) -> Callable[[Path, Adapter], None]:
    """Return a writer that loses the updates."""

    def wrong(folder: Path, adapter: Adapter) -> None:
        write(folder, adapter)
        edit(folder, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor)

    return wrong


@pytest.mark.parametrize("std", [0.2, TINY])
def test_an_adapter_that_peft_reads_otherwise_is_found_however_small_it_is(
    std: float, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_adapter("one", 1, std=std, r=2)
    record = convert_adapter(one, tmp_path / "right")
    assert record["check"]["peft_error"] < 1e-6
    assert (record["check"]["logits_change"] > 1e-3) == (std == 0.2)
    monkeypatch.setattr(make, "write_folder", without_updates(make.write_folder))
    with pytest.raises(RunError, match="off the closed form"):
        convert_adapter(one, tmp_path / "out")
    monkeypatch.setattr(make, "check_updates", lambda written, wanted: 0.0)
    with pytest.raises(RunError, match="as PEFT loads it"):
        convert_adapter(one, tmp_path / "out")


def test_a_bias_that_peft_reads_otherwise_is_found(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    one = make_adapter("one", 1, base=tmp_path / "base", r=2, bias="lora_only")
    write = make.write_folder

    def wrong(folder: Path, adapter: Adapter) -> None:
        write(folder, adapter)
        edit(folder, lambda name, tensor: tensor * 1.001 if name.endswith("q_proj.base_layer.bias") else tensor)

    monkeypatch.setattr(make, "write_folder", wrong)
    with pytest.raises(RunError, match=r"q_proj\.bias"):
        convert_adapter(one, tmp_path / "out")


def test_a_merge_that_drops_the_adapter_fails_and_what_rounding_hides_is_undecided(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_adapter("small", 1, std=0.01, r=2)
    assert merge_adapter(small, tmp_path / "right", dtype="float32")["verdict"] == "same"
    for std in (3e-6, 1e-8):  # of which float32 itself keeps nothing beside the base's weights
        tiny = make_adapter(f"tiny-{std}", 1, std=std, r=2)
        hidden = merge_adapter(tiny, tmp_path / f"hidden-{std}", dtype="bfloat16")
        assert (hidden["verdict"], hidden["kept"]) == ("undecided", 0), std
    nothing = make_adapter("nothing", 1, std=0.0, r=2)
    assert merge_adapter(nothing, tmp_path / "base", dtype="bfloat16")["verdict"] == "same"
    write = compare.write_merged
    monkeypatch.setattr(compare, "write_merged", lambda base, updates, out, **more: write(base, {}, out, **more))
    with pytest.raises(RunError, match="4 of 4 matrices lack their update"):
        merge_adapter(small, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_an_adapter_and_its_negative_are_nothing_within_rounding(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one = make_adapter("one", 1, r=4)
    nearly = make_adapter("nearly", 1, r=4)
    edit(nearly, lambda name, tensor: tensor * (1 + 1e-4) if "lora_B" in name else tensor)
    for other in (one, nearly):
        record = combine_adapters([one, other], tmp_path / other.name / "sum", weights=[3, -3])
        assert record["check"]["relative_error"] < 1e-6  # of what was added, not of what is left


def lowrank(size: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 8, generator=generator), size * torch.randn(6, 2, generator=generator)
    return LowRank(a=a.to(dtype).float(), b=b.to(dtype).float(), scale=1.0, dtype=dtype)


def test_a_wrong_small_matrix_is_not_hidden_by_a_large_one(tmp_path: Path) -> None:
    right = {"large": lowrank(1e6), "small": lowrank(1e-3, 1)}
    wanted = {name: [(1.0, update)] for name, update in right.items()}
    assert check_updates(Adapter(path=tmp_path, config={}, updates=right), wanted) == 0
    wrong = {**right, "small": lowrank(2e-3, 1)}
    with pytest.raises(RunError, match="small"):
        check_updates(Adapter(path=tmp_path, config={}, updates=wrong), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_adapters_are_the_same_within_the_rounding_of_the_type_that_the_second_is_written_in(
    dtype: torch.dtype,
) -> None:
    one, other = lowrank(0.1), lowrank(0.1, dtype=dtype)
    proof = prove_adapter({"q": one}, {"q": other})
    assert proof["problems"] == []
    assert proof["types"] == [{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]]
    rounding = torch.finfo(dtype).eps
    for factor in (
        1 + max(1e-5, 16 * rounding),
        1 - max(1e-5, 16 * rounding),
        1.25,
    ):  # of which the last was once called the same
        assert prove_adapter({"q": one}, {"q": replace(other, scale=factor)})["problems"], factor
    magnitude = torch.rand(6) + 1
    norms = prove_adapter({"q": replace(one, magnitude=magnitude)}, {"q": replace(other, magnitude=magnitude * 1.02)})
    assert "a different update" in norms["problems"][0]
    if dtype is not torch.float32:  # whose values another program may have rounded, but these files say that none has
        again = prove_adapter({"q": one}, {"q": replace(other, dtype=torch.float32)})
        assert again["problems"]


def test_values_are_compared_to_the_unit_roundoff_of_their_type() -> None:
    values = torch.randn(1000)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same_values(values, values.to(dtype))
        off = values * (1 + max(4e-6, 1.5 * torch.finfo(dtype).eps))
        assert not same_values(values, off.to(dtype))
    assert not same_values(values, values[:10])
    assert not same_values(values, None)
    assert not same_values(values, values * torch.nan)
    whole = {"head.weight": Replaced(values=values)}
    other = {"head.weight": Replaced(values=values * 1.001)}
    assert prove_adapter({"q": lowrank(1)}, {"q": lowrank(1)}, whole, other)["problems"]


def test_tensors_beside_the_matrices_are_compared_as_sharply(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one = make_adapter("one", 1, r=2, modules_to_save=["norm"])
    merge_adapter(one, tmp_path / "merged")
    assert certify_adapter(one, tmp_path / "merged")["verdict"] == "same"
    two = make_adapter("two", 1, r=2, modules_to_save=["norm"])
    for folder in (two, tmp_path / "merged"):
        edit(folder, lambda name, tensor: tensor * 1.0001 if name.endswith("model.norm.weight") else tensor)
        found = certify_adapter(one, folder)
        assert found["verdict"] == "different"
        assert "norm" in found["problems"][0]


@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:`lora_bias=True` was passed")
def test_another_bias_and_a_matrix_that_one_of_two_adapters_lacks_are_named(make_adapter: MakeAdapter) -> None:
    one, two = (make_adapter(name, 1, r=2, lora_bias=True) for name in ("one", "two"))
    assert certify_adapter(one, two)["verdict"] == "same"
    module = "model.layers.1.self_attn.v_proj"
    edit(two, lambda name, tensor: tensor * 1.001 if name.endswith(f"{module}.lora_B.bias") else tensor)
    found = certify_adapter(one, two)
    assert (found["verdict"], found["problems"]) == ("different", [f"biases differ: {module}.lora_B.bias"])
    file = two / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if module not in name}, file, {"format": "pt"})
    assert f"(the first: {module})" in certify_adapter(one, two)["problems"][0]
    assert module in certify_adapter(two, one)["problems"][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_value_that_nothing_was_added_to_is_seen_also_beside_nan(
    dtype: str, make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "damaged"))

    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.embed_tokens.weight":
            tensor[5] = torch.nan
        return tensor

    edit(base, spoil)
    one = make_adapter("one", 1, base=base, r=2)
    assert merge_adapter(one, tmp_path / "merged", dtype=dtype)["verdict"] == "same"
    step = 2 * torch.finfo(getattr(torch, dtype)).eps if dtype == "bfloat16" else 1e-5

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.embed_tokens.weight":
            tensor[7, 3] *= 1 + step
        return tensor

    edit(tmp_path / "merged", change)
    found = certify_adapter(one, tmp_path / "merged")
    assert found["verdict"] == "different"
    assert "model.embed_tokens.weight" in found["problems"][0]


def test_logits_are_compared_as_a_share_of_what_the_adapter_does_to_them(
    make_adapter: MakeAdapter, tiny_model: Path
) -> None:
    adapter = read_folder(make_adapter("one", 1, std=0.005, r=2))
    wanted = check.closed_form(adapter)
    right = check.check_by_peft(tiny_model, adapter.path, wanted, adapter)
    assert isinstance(right, check.ByPeft)
    assert right.logits_change is not None
    assert 0 < check.logits_limit(right.logits_change) < check.LOGITS_TOLERANCE
    assert check.logits_limit(0.0) == check.ARITHMETIC
    assert check.logits_limit(1.0) == check.LOGITS_TOLERANCE
    seen: Any = right.logits_difference
    assert seen <= check.logits_limit(right.logits_change)
