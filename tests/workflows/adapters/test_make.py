"""Adapters made of others are what their closed form says, by PEFT's own reading of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loratune.exporting.adapters import check
from loratune.exporting.adapters.algebra import dense, effective_rank, inner_product, norm, singular_values, truncated
from loratune.exporting.adapters.combine import METHODS, Method
from loratune.exporting.adapters.extract import extract
from loratune.exporting.adapters.folder import read_folder
from loratune.run.errors import RecipeError, RunError
from loratune.workflows.adapters import make
from loratune.workflows.adapters.base import fingerprint
from loratune.workflows.adapters.compare import certify_adapter, diff_adapters, inspect_adapter, merge_adapter
from loratune.workflows.adapters.make import combine_adapters, convert_adapter, extract_adapter, resize_adapter
from tests.conftest import some
from tests.workflows.adapters.conftest import MakeAdapter, change_config, load


def updates_by_peft(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Each module's update as PEFT computes it."""
    model: Any = PeftModel.from_pretrained(load(base), str(folder))
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A
    }


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    off = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return float((off / sum(float(tensor.square().sum()) for tensor in wanted.values())) ** 0.5)


def test_two_rslora_adapters_of_other_ranks_are_their_weighted_sum_and_pefts_answer_is_not(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    one = make_adapter("one", 1, r=8, lora_alpha=16, use_rslora=True)
    two = make_adapter("two", 2, r=16, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "o_proj"])
    first, second = updates_by_peft(tiny_model, one), updates_by_peft(tiny_model, two)
    wanted = {
        name: 0.7 * first.get(name, torch.zeros(1).double()) - 0.3 * second.get(name, torch.zeros(1).double())
        for name in sorted({*first, *second})
    }
    record = combine_adapters([one, two], tmp_path / "sum", weights=[0.7, -0.3])
    assert relative(updates_by_peft(tiny_model, tmp_path / "sum"), wanted) < 1e-6
    assert record["ranks"] == [8, 24]
    assert record["check"]["relative_error"] < 1e-6
    assert record["check"]["logits_difference"] < 1e-4 < 1e-2 < record["check"]["logits_change"]

    # Beside it, PEFT's: it keeps `use_rslora` for a sum whose scale it has already put into the factors.
    model: Any = PeftModel.from_pretrained(load(tiny_model), str(one), adapter_name="one")
    model.load_adapter(str(two), "two")
    model.add_weighted_adapter(["one", "two"], [0.7, -0.3], "both", combination_type="cat")
    theirs = {
        name.removeprefix("base_model.model."): module.get_delta_weight("both").double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "both" in module.lora_A
    }
    assert relative(theirs, wanted) == pytest.approx(24**0.5 - 1, rel=1e-4)  # √(8 + 16) times too large


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes the bias of B for an incomplete matrix
def test_patterns_and_added_biases_are_summed_too(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    base = tmp_path / "base"
    Qwen2ForCausalLM(config).save_pretrained(base)  # its q, k and v have biases
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    one = make_adapter("one", 1, base=base, r=2, lora_alpha=8, lora_bias=True, **patterns)
    two = make_adapter("two", 2, base=base, r=4, lora_alpha=4, bias="all")
    record = combine_adapters([one, two], tmp_path / "sum", weights=[2, 0.5])
    assert record["check"]["logits_difference"] < 1e-4  # biases included: these are not in the updates
    assert record["ranks"] == [6, 7]
    read = [read_folder(folder) for folder in (one, two, tmp_path / "sum")]
    name = "model.layers.1.self_attn.v_proj"
    assert read[0].updates[name].scale == 5 / 2
    own = load(base).get_parameter(f"{name}.bias").double()
    wanted = own + 0.5 * (read[1].biases[f"{name}.bias"].double() - own)
    assert torch.allclose(read[2].biases[f"{name}.bias"].double(), wanted, atol=1e-6)
    assert torch.allclose(read[2].added_biases[name], 2 * read[0].added_biases[name])
    shown = inspect_adapter(one)
    assert f"{name}.bias" in shown["other"]
    merged = merge_adapter(tmp_path / "sum", tmp_path / "merged")
    assert merged["verdict"] == "same"
    tokens = torch.arange(8)[None]
    by_peft = PeftModel.from_pretrained(load(base), str(tmp_path / "sum"))(input_ids=tokens).logits
    assert torch.allclose(by_peft, load(tmp_path / "merged")(input_ids=tokens).logits, atol=1e-4)


@pytest.mark.parametrize("method", some(METHODS[1:], "svd", "ties"))
def test_approximations_are_those_of_peft(
    method: str, make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    one = make_adapter("one", 1, r=4, lora_alpha=4, target_modules=["q_proj"])
    two = make_adapter("two", 2, r=4, lora_alpha=4, target_modules=["q_proj"])
    # DARE draws other numbers for our float64 than for PEFT's float32, so it is compared where nothing is dropped.
    density = 1 - 1e-12 if "dare" in method else 0.7  # PEFT warns of 1
    how = Method(name=method, density=density if method in ("ties", "dare_linear", "dare_ties") else None)
    record = combine_adapters([one, two], tmp_path / "ours", weights=[0.6, 0.4], method=how)
    model: Any = PeftModel.from_pretrained(load(tiny_model), str(one), adapter_name="one")
    model.load_adapter(str(two), "two")
    theirs = method if method in ("svd", "linear") else f"{method}_svd"
    model.add_weighted_adapter(["one", "two"], [0.6, 0.4], "both", combination_type=theirs, density=density)
    wanted = {
        name.removeprefix("base_model.model."): module.get_delta_weight("both").double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "both" in module.lora_A
    }
    assert relative(updates_by_peft(tiny_model, tmp_path / "ours"), wanted) < 1e-4
    assert record["ranks"] == [4, 4]
    assert (record["discarded_share"] > 0.01) == (method != "linear")


def test_resize_keeps_the_share_that_it_says(make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path) -> None:
    one = make_adapter("one", 1, r=8, lora_alpha=16, use_rslora=True)
    record = resize_adapter(one, tmp_path / "small", rank=3)
    wanted, found = updates_by_peft(tiny_model, one), updates_by_peft(tiny_model, tmp_path / "small")
    lost = relative(found, wanted) ** 2
    assert record["discarded_share"] == pytest.approx(lost, rel=1e-4)
    assert 0.01 < lost < record["worst_share"]
    assert record["ranks"] == [3, 3]
    by_energy = resize_adapter(one, tmp_path / "enough", energy=0.9)
    assert by_energy["worst_share"] <= 0.1
    whole = resize_adapter(one, tmp_path / "whole", rank=64)
    assert whole["ranks"] == [8, 8]
    assert certify_adapter(one, tmp_path / "whole")["verdict"] == "same"
    assert certify_adapter(one, tmp_path / "small")["verdict"] == "different"
    with pytest.raises(RecipeError, match="neither a rank nor a share"):
        resize_adapter(one, tmp_path / "none")
    for wrong in ({"energy": 0.0}, {"energy": 1.1}, {"rank": 0}):
        with pytest.raises(RecipeError, match=r"at most 1|1 or more"):
            resize_adapter(one, tmp_path / "none", **wrong)
        with pytest.raises(RecipeError, match=r"at most 1|1 or more"):
            extract_adapter(tiny_model, tiny_model, tmp_path / "none", **wrong)


def test_a_full_fine_tune_minus_its_base_is_the_adapter_that_was_merged(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    one = make_adapter("one", 1, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    merge_adapter(one, tmp_path / "tuned", dtype="float32")
    record = extract_adapter(tmp_path / "tuned", tiny_model, tmp_path / "out", rank=4)
    wanted, found = updates_by_peft(tiny_model, one), updates_by_peft(tiny_model, tmp_path / "out")
    assert relative(found, wanted) < 1e-5
    assert record["discarded_share"] < 1e-9
    assert record["left_out"] == {}
    file = next((tmp_path / "tuned").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    again = extract_adapter(tmp_path / "tuned", tiny_model, tmp_path / "again", rank=1)
    assert list(again["left_out"]) == ["model.norm.weight"]
    assert again["discarded_share"] > 0.1
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1, "score.weight": torch.ones(2, 2)}
    save_file(tensors, file, metadata={"format": "pt"})
    more = extract_adapter(tmp_path / "tuned", tiny_model, tmp_path / "more", rank=1)["left_out"]
    assert (more["score.weight"], more["lm_head.weight"]) == (
        2,
        pytest.approx(tensors["lm_head.weight"].numel() ** 0.5),
    )
    with pytest.raises(RecipeError, match="changed no matrix of its base"):  # of no module at all
        extract(tiny_model, tmp_path / "tuned", {}, rank=1, energy=None, progress=lambda: None)
    with pytest.raises(RecipeError, match="changed no matrix of its base"):
        extract_adapter(tiny_model, tiny_model, tmp_path / "none", rank=1)


def test_dora_merges_and_is_refused_by_name_where_it_has_no_sum(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    dora, plain = make_adapter("dora", 1, r=2, use_dora=True), make_adapter("plain", 2, r=2)
    for refused in (
        lambda: combine_adapters([plain, dora], tmp_path / "sum"),
        lambda: resize_adapter(dora, tmp_path / "small", rank=1),
        lambda: convert_adapter(dora, tmp_path / "plain-dora"),
        lambda: diff_adapters(plain, dora),
    ):
        with pytest.raises(RecipeError, match="the adapter is DoRA"):
            refused()
    assert inspect_adapter(dora)["kind"] == "DoRA"
    assert merge_adapter(dora, tmp_path / "merged")["verdict"] == "same"
    assert certify_adapter(plain, tmp_path / "merged")["verdict"] == "different"


def test_adapters_of_other_bases_are_refused(make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    file = next(other.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(other) != fingerprint(tiny_model)
    one, two = make_adapter("one", 1, r=2), make_adapter("two", 2, r=2, base=other)
    with pytest.raises(RecipeError, match="trained on other weights"):
        combine_adapters([one, two], tmp_path / "sum")
    with pytest.raises(RecipeError, match="trained on other weights"):
        merge_adapter(one, tmp_path / "merged", base=other)
    for folder, name in ((one, "me/one"), (two, "me/two")):  # names of the Hub, which say no more
        change_config(folder, base_model_name_or_path=name)
    with pytest.raises(RecipeError, match="name different bases: me/one and me/two"):
        combine_adapters([one, two], tmp_path / "sum")
    assert combine_adapters([one, two], tmp_path / "sum", base=tiny_model)["check"]["logits_difference"] is not None


def test_a_wrong_scale_is_found_in_weights_and_in_logits(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_adapter("one", 1, r=4, lora_alpha=4)
    write = make.write_folder

    def too_large(folder: Path, adapter: Any) -> None:
        write(folder, adapter)
        change_config(folder, lora_alpha=4.1)

    monkeypatch.setattr(make, "write_folder", too_large)
    with pytest.raises(RunError, match="off the closed form"):
        convert_adapter(one, tmp_path / "plain")
    monkeypatch.setattr(make, "check_updates", lambda written, wanted: 0.0)
    with pytest.raises(RunError, match=r"as PEFT loads it, is 0\.025 off"):
        convert_adapter(one, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    assert check.LOGITS_TOLERANCE == 1e-4


def test_sizes_and_angles_need_no_dense_update(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one, two = make_adapter("one", 1, r=4, use_rslora=True), make_adapter("two", 2, r=2)
    first, second = (next(iter(read_folder(folder).updates.values())) for folder in (one, two))
    assert norm(first) == pytest.approx(float(dense(first).norm()))
    assert inner_product(first, second) == pytest.approx(float((dense(first) * dense(second)).sum()))
    values = torch.linalg.svdvals(dense(first))[:4]
    assert torch.allclose(singular_values(first), values)
    assert truncated(first, rank=2)[1].share == pytest.approx(float(values[2:].square().sum() / values.square().sum()))
    assert effective_rank(torch.ones(4)) == pytest.approx(4)
    assert effective_rank(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    combine_adapters([one], tmp_path / "double", weights=[2])
    found = diff_adapters(one, tmp_path / "double")
    assert (found["relative_difference"], found["cosine"]) == (pytest.approx(1), pytest.approx(1))
    assert diff_adapters(one, one)["relative_difference"] < 1e-7


@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:`lora_bias=True` was passed")
def test_biases_and_an_adapter_of_zeros_are_compared_in_valid_json(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one, two = (make_adapter(name, 1, r=2, lora_bias=True, modules_to_save=["norm"]) for name in ("one", "two"))
    file = two / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.lora_B.bias"
    tensors[f"base_model.model.{name}"] *= 2
    save_file(tensors, file)
    found = diff_adapters(one, two)
    assert found["relative_difference"] < 1e-7
    rows = {row["name"]: row["relative_difference"] for row in found["others"]}
    assert rows[name] == pytest.approx(1)
    assert max(value for other, value in rows.items() if other != name) < 1e-7
    assert "model.norm.weight" in rows
    save_file({key: tensor * 0 if "lora_B" in key else tensor for key, tensor in tensors.items()}, file)
    zeros = diff_adapters(two, one)
    assert json.loads(json.dumps(zeros, allow_nan=False))["relative_difference"] is None
    plain = make_adapter("plain", 1, r=2)
    assert diff_adapters(plain, one)["only_second"] == sorted(rows)


def test_settings_that_a_method_has_not_are_refused_and_dare_draws_by_its_seed(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    for wrong, words in (
        ({"rank": 4}, "--rank 4 has no meaning for --method concat"),
        ({"name": "linear", "rank": 4}, "--rank"),
        ({"name": "svd", "density": 0.5}, "--density"),
        ({"name": "ties", "seed": 1}, "--seed"),
        ({"name": "ties", "density": 0.0}, "above 0 and at most 1"),
        ({"name": "ties", "density": 1.5}, "above 0 and at most 1"),
        ({"name": "svd", "rank": 0}, "1 or more"),
        ({"name": "mean"}, "unknown"),
    ):
        with pytest.raises(RecipeError, match=words):
            Method(**wrong)
    one = make_adapter("one", 1, r=2)
    with pytest.raises(RecipeError, match="not all finite"):
        combine_adapters([one], tmp_path / "none", weights=[float("nan")])
    found = {}
    for folder, seed in (("a", None), ("b", 0), ("c", 1)):
        torch.rand(1)  # the caller's own random numbers change nothing
        method = Method(name="dare_linear", density=0.5, seed=seed)
        record = combine_adapters([one, one], tmp_path / folder, method=method)
        assert record["seed"] == (seed or 0)
        found[folder] = load_file(tmp_path / folder / "adapter_model.safetensors")
    assert all(torch.equal(found["a"][name], found["b"][name]) for name in found["a"])
    assert not all(torch.equal(found["a"][name], found["c"][name]) for name in found["a"])
    assert combine_adapters([one], tmp_path / "d", method=Method(name="ties", density=1.0))["seed"] is None
