"""The proof by weights sees what was written, whatever the type rounds away, and agrees with PEFT's own merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

from loratune.exporting import weights_proof
from loratune.exporting.adapter_matrices import LowRank, read_adapter
from loratune.exporting.merge_weights import MergedWeights, write_merged
from loratune.exporting.weights_proof import prove_adapter, prove_weights, trained_weight
from loratune.exporting.written_tensors import FolderTensors, gguf_rounding, rounding_to
from loratune.run.directory import Record, RunDir, read_json

BASE = "the base"


def update(seed: int, *, size: float = 0.1, magnitude: bool = False, transposed: bool = False) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        a=torch.randn(4, 24, generator=generator),
        b=size * torch.randn(16, 4, generator=generator),
        scale=2.0,
        magnitude=torch.rand(16, generator=generator) + 0.5 if magnitude else None,
        transposed=transposed,
    )


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_two_formulas_of_a_merged_matrix_agree(magnitude: bool, transposed: bool) -> None:
    one = update(0, magnitude=magnitude, transposed=transposed)
    weight = torch.randn(24, 16) if transposed else torch.randn(16, 24)
    torch.testing.assert_close(trained_weight(weight, one), one.applied_to(weight))


def folder_of(run: RunDir) -> Path:
    return Path(read_json(run.lock)["inputs"]["model_path"])


def proof(run: RunDir, folder: Path, updates: dict[str, LowRank] | None = None) -> Record:
    updates = read_adapter(run.adapter) if updates is None else updates
    with MergedWeights(folder_of(run), updates) as weights, FolderTensors(folder, tied=True) as written:
        record = prove_weights(weights, written, base_name=BASE)
    assert record is not None
    return record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_by_peft_is_right(finished_run: RunDir, tmp_path: Path, dtype: torch.dtype) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(str(finished_run.adapter), dtype=dtype)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    record = proof(finished_run, tmp_path / "merged")
    assert record["problems"] == []
    assert record["kept"] == pytest.approx(1, abs=1e-2)
    assert record["largest_deviation"] < 0.25
    assert (record["num_changed"], record["num_unchanged"]) == (14, 6)


def test_a_lost_update_is_seen_however_little_of_it_rounding_leaves(finished_run: RunDir, tmp_path: Path) -> None:
    tiny = {name: replace(one, b=one.b * 1e-3) for name, one in read_adapter(finished_run.adapter).items()}
    (tmp_path / "right").mkdir()
    write_merged(folder_of(finished_run), tiny, tmp_path / "right", dtype=torch.bfloat16)
    right = proof(finished_run, tmp_path / "right", tiny)
    assert right["problems"] == []
    assert right["relative_error"] > 1, "rounding is larger than the update"
    (tmp_path / "dropped").mkdir()
    write_merged(folder_of(finished_run), {}, tmp_path / "dropped", dtype=torch.bfloat16)
    dropped = proof(finished_run, tmp_path / "dropped", tiny)
    assert dropped["problems"][0].startswith("14 of 14 matrices lack their update")
    assert dropped["kept"] == pytest.approx(0, abs=1e-6)
    assert dropped["largest_deviation"] == pytest.approx(1)


def test_a_merge_that_forgets_is_not_believed_by_its_own_formula(
    finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowRank, "applied_to", lambda _, weight: weight)
    write_merged(folder_of(finished_run), read_adapter(finished_run.adapter), tmp_path, dtype=torch.bfloat16)
    assert "14 of 14 matrices lack their update" in proof(finished_run, tmp_path)["problems"][0]


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(2, 2)


def _other_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] += 0.01


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


def _half(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][::2] += 0.5


@pytest.mark.parametrize(
    ("change", "words", "what_to_do"),
    [
        (_missing, "1 of 20 tensors are missing", "export again"),
        (_extra, "it holds model.layers.2.mlp.up_proj.weight", "export again"),
        (
            _other_norm,
            "1 of 6 tensors that the adapter does not change are not those of the base",
            "merge into the base that the run was trained on",
        ),
        (_nan, "1 of 20 tensors hold values that are not finite", "export again"),
        (_half, "1 of 14 matrices have a different update than the adapter's", "merge again with `loratune merge`"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(
    finished_run: RunDir, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str, what_to_do: str
) -> None:
    write_merged(folder_of(finished_run), read_adapter(finished_run.adapter), tmp_path, dtype=None)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    record = proof(finished_run, tmp_path)
    (problem,), (fix,) = record["problems"], record["fixes"]
    assert words in problem
    assert what_to_do in fix


def test_an_adapter_is_compared_by_its_products() -> None:
    wanted = {"q": update(0), "v": update(1)}
    turned = torch.linalg.qr(torch.randn(4, 4)).Q
    same = {name: replace(one, a=turned.T @ one.a, b=one.b @ turned) for name, one in wanted.items()}
    assert prove_adapter(wanted, same)["problems"] == []
    assert prove_adapter(wanted, same)["relative_error"] < 1e-5
    halved = prove_adapter(wanted, {**wanted, "v": replace(wanted["v"], scale=1.0)})
    assert halved["problems"] == ["1 of 2 matrices have a different update than the adapter's (the first: v)"]
    assert "are missing" in prove_adapter(wanted, {"q": wanted["q"]})["problems"][0]
    assert "it holds k" in prove_adapter(wanted, {**wanted, "k": update(2)})["problems"][0]


def test_the_largest_deviation_of_a_right_export_is_far_from_that_of_a_wrong_one() -> None:
    assert 0 < weights_proof.MOST_DEVIATION < 0.5


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_rounding_is_that_of_the_gguf_type_and_once_is_enough(kind: str) -> None:
    rounded = gguf_rounding(GGMLQuantizationType[kind])
    assert rounded is not None
    values = torch.randn(8, 64)
    once = rounded(values)
    assert 0 < float((once - values).abs().max()) < 1
    if kind in ("F16", "BF16"):
        assert torch.equal(once, rounding_to({"F16": torch.float16, "BF16": torch.bfloat16}[kind])(values))
    assert gguf_rounding(GGMLQuantizationType.Q4_K) is None, "the gguf package reads it and does not write it"


def test_the_record_is_json(finished_run: RunDir, tmp_path: Path) -> None:
    write_merged(folder_of(finished_run), read_adapter(finished_run.adapter), tmp_path, dtype=None)
    json.dumps(proof(finished_run, tmp_path), allow_nan=False)
